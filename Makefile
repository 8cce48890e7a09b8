# Two commands are enough: `make demo` and `make test`. Each builds .venv on its first use.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
SEEDS ?= 0 1 2 3 4

.PHONY: demo test test-slow package test-gpu lint format docs results bench study-baselines study-proxy study-adaptive clean

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[dev]'
	$(BIN)/python -W ignore -m compileall -qq -j 0 .venv/lib || true  # pip would use one core
	touch $@

# Digits with 40% wrong labels: plain training, online selection, and selection with horizon and
# learning rate under control. Prints tables and a verdict; some four minutes on two CPU cores.
# Five seeds: with three, a difference of five points in accuracy cannot be told from chance.
demo: $(READY)
	for seed in $(SEEDS); do for run in uniform online adaptive; do \
	  $(BIN)/python trainers/vision.py configs/digits_$$run.yaml \
	    seed=$$seed data.seed=$$seed overwrite=true || exit 1; \
	done; done
	$(BIN)/selectflow compare $(foreach seed,$(SEEDS),runs/digits_uniform-s$(seed) \
	  runs/digits_online-s$(seed) runs/digits_adaptive-s$(seed)) --out runs/demo

# Tests start many processes, which should not all compile the package, whatever the environment says.
test: $(READY)
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# What takes minutes: the slow tests, among them the demo's claims over five seeds.
test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

# The package, built and installed into an empty environment, runs there.
package: $(READY)
	$(BIN)/python -m pytest -m slow tests/test_package.py

# Precision, memory and cost on a CUDA device, some minutes; skips itself without one.
test-gpu: $(READY)
	$(BIN)/python tests/gpu/check.py --out build/gpu.json

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A page of each module, in build/docs. Warnings are errors, but for two: pdoc finds some of the modules
# by itself as well, and shows the annotations of a NamedTuple's constructor as they are written.
MODULES = $(subst /,.,$(patsubst %/__init__,%,$(basename $(shell find selectflow -name '[!_]*.py' -o -name __init__.py))))
docs: $(READY)
	rm -rf build/docs
	$(BIN)/python -W error -W 'ignore:The module specification' \
	  -W 'ignore:Error parsing type annotation' -m pdoc --docformat google \
	  --output-directory build/docs $(sort $(MODULES))

# Selection against plain training, over seeds: the tables and figures of notebooks/RESULTS.md, in
# runs/results/.
# TASKS="noised clean" makes a part; finished runs are not repeated.
TASKS ?= noised clean imbalanced text lora finetune
results: $(READY)
	$(BIN)/python tests/benchmarks/results.py --tasks $(TASKS)

# What else one could do with a stream and a target set, on five tasks; about an hour of one core.
# The photographs and the doctors' visits come with two packages that nothing else here needs.
study-baselines: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check scikit-image statsmodels
	$(BIN)/python tests/benchmarks/baselines.py

# Cost of a step and its parts, each printing the figures of notebooks/RESULTS.md.
bench: $(READY)
	$(BIN)/python tests/benchmarks/step_cost.py
	$(BIN)/python tests/benchmarks/control_cost.py
	$(BIN)/python tests/benchmarks/scored_part_cost.py
	$(BIN)/python tests/benchmarks/sweep_cost.py
	$(BIN)/python tests/benchmarks/data_throughput.py

# The error proxy: predicted against true error, by learning rate and horizon.
study-proxy: $(READY)
	for model in mlp cnn gpt2; do \
	  $(BIN)/selectflow audit configs/audit_proxy_$$model.yaml || exit 1; \
	done

# One adaptive run against a grid of fixed horizons and learning rates, on digits and on text; hours.
study-adaptive: $(READY)
	$(BIN)/python tests/benchmarks/adaptive_study.py

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache
