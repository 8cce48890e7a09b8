"""A sweep in W&B's own format: what varies, how it is searched, and what is measured.

    program: trainers/vision.py
    command: ["${env}", "${interpreter}", "${program}", CONFIG.yaml, "${args_no_hyphens}"]
    method: grid
    metric: {name: target/loss, goal: minimize}
    parameters: {optimizer.lr: {values: [1.0e-3, 3.0e-3]}, seed: {values: [0, 1, 2]}}

The parameters are keys of the run's configuration, dotted or nested. `seed` is not searched: every
cell, one setting of the other parameters, is run with each of its values.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from selectflow.fields import ConfigError, Count, Section, describe, expanded
from selectflow.run.config import RunConfig, load, plain_name
from selectflow.run.yaml import as_override, read_yaml
from selectflow.tune.domains import (
    ONLY_ON_WANDB,
    Choice,
    Domain,
    Range,
    counted,
    distinct,
    read_domains,
)

_MACROS = ("${env}", "${interpreter}", "${program}", "${args_no_hyphens}")
# set for every run here, so that cells which differ in them alone would be one run
_OWN = {"name", "root", "resume", "overwrite", "num_threads"}
_COMMAND = f"[{', '.join(_MACROS[:3])}, CONFIG.yaml, {_MACROS[3]}]"


class TuneError(ValueError):
    """A sweep that cannot be run; the message says why."""


class Metric(Section):
    """What a sweep minimizes or maximizes."""

    name: str = Field(description="a metric of the target set, as target/loss")
    goal: Literal["minimize", "maximize"] = Field(default="minimize", description="direction")


class Hyperband(Section):
    """Early termination: at each bracket only the best 1/eta of the cells that got there go on.

    Brackets are at min_iter, or given max_iter and s at max_iter / eta^s, and at eta times each.
    """

    type: Literal["hyperband"] = Field(description="hyperband: W&B's only one")
    min_iter: Count | None = Field(default=None, description="evaluations before the first bracket")
    max_iter: Count | None = Field(default=None, description="evaluations of a whole cell")
    s: Count | None = Field(default=None, description="brackets, counted back from max_iter")
    eta: Annotated[int, Field(ge=2)] = Field(default=3, description="one in eta goes on")

    @property
    def first(self) -> int:
        """Evaluations before the first bracket."""
        if self.min_iter is not None:
            return self.min_iter
        assert self.max_iter is not None
        return max(1, int(self.max_iter // self.eta ** (self.s or 1)))

    @model_validator(mode="after")
    def _has_brackets(self) -> Self:
        if self.min_iter is None and self.max_iter is None:
            rule = {"rule": "a mapping with min_iter, or with max_iter and s"}
            raise PydanticCustomError("rule", "must be {rule}", rule)
        return self


class SweepFile(Section):
    """The keys of a sweep file."""

    program: Annotated[str, BeforeValidator(expanded)] = Field(
        description="the trainer, a Python file"
    )
    method: Literal["grid", "random", "bayes"] = Field(description="how settings are chosen")
    metric: Metric = Field(description="what is optimized")
    parameters: dict[str, Any] = Field(min_length=1, description="what varies")
    command: tuple[str, ...] = Field(strict=False, description=f"as {_COMMAND}")
    early_terminate: Hyperband | None = Field(default=None, description="stop poor cells early")
    run_cap: Count | None = Field(default=None, description="most cells that are tried")
    name: str | None = Field(default=None, description="of the sweep")
    description: str | None = Field(default=None, description="for people")
    project: str | None = Field(default=None, description="W&B project")
    entity: str | None = Field(default=None, description="W&B entity")


@dataclass(frozen=True)
class Sweep:
    """A sweep that can be run.

    Attributes:
        name: of the sweep, any text.
        keys: the file's other keys.
        domains: of every parameter but the seed, by dotted key.
        seeds: every cell is run with each; empty: with the configuration's own.
        config: the YAML that the settings are applied to.
        overrides: `key=value` that the command gives to every run.
        raw: the file's mapping, as W&B takes it.
    """

    name: str
    keys: SweepFile
    domains: dict[str, Domain]
    seeds: tuple[int, ...]
    config: Path
    overrides: tuple[str, ...]
    raw: dict[str, Any]

    @property
    def plain_name(self) -> str:
        """The name as a part of directory names."""
        return plain_name(self.name)

    def grid(self) -> list[dict[str, Any]]:
        """Every setting of a grid, the last parameter changing fastest."""
        choices = [domain.values for domain in self.domains.values() if isinstance(domain, Choice)]
        chosen = itertools.product(*choices)
        return [dict(zip(self.domains, values, strict=True)) for values in chosen]

    def local_overrides(self, out: Path, seed: int | None) -> list[str]:
        """The overrides of every run under the directory `out`, in addition to its setting."""
        overrides = [
            as_override("name", self.run_name()),
            as_override("root", str(out / "runs")),
            "resume=auto",
            "overwrite=false",
            "num_threads=1",
        ]
        if "track.wandb" not in self.domains:
            overrides.append("track.wandb=disabled")  # metrics.jsonl has all that the sweep reads
        return overrides if seed is None else [*overrides, f"seed={seed}"]

    def run_name(self) -> str:
        """A name that differs for every run of the sweep, as `RunConfig.name` has it."""
        varied = {
            key: () if isinstance(domain, Range) else domain.values
            for key, domain in self.domains.items()
            if isinstance(domain, Range) or len(domain.values) > 1
        }
        # no word may hold what is between two values: "a-b1" and "c" are not "a" and "b1-c"
        words = " ".join(
            word for values in varied.values() for word in values if isinstance(word, str)
        )
        between = "-" * (1 + max(map(len, re.findall("-+", words)), default=0))
        parts = [f"{key.rpartition('.')[2].replace('_', '-')}{{{key}}}" for key in varied]
        return between.join([*parts, "s{seed}"])

    def load(self, setting: Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
        """The configuration of a run.

        Raises:
            ConfigError: a parameter is unknown, or a value out of its range.
        """
        return load(self.config, self.arguments(setting, overrides)[1:])

    def arguments(self, setting: Mapping[str, Any], overrides: Sequence[str] = ()) -> list[str]:
        """The trainer's arguments: the YAML, the command's overrides, the setting, and others."""
        given = [as_override(key, value) for key, value in setting.items()]
        return [str(self.config), *self.overrides, *given, *overrides]


def load_sweep(path: str | Path) -> Sweep:
    """The sweep in a YAML file, checked together with the configuration that it varies.

    Returns:
        The sweep. Its paths are taken from the working directory, as W&B's agents do.

    Raises:
        ConfigError: the file cannot be read, uses what is not supported, selects on anything but
            the target set, or gives an unknown parameter or a value out of its range.
    """
    raw = read_yaml(path)
    try:
        keys = SweepFile.model_validate(raw)
    except ValidationError as error:
        known = [*SweepFile.model_fields, *(f"metric.{key}" for key in Metric.model_fields)]
        known += [f"early_terminate.{key}" for key in Hyperband.model_fields]
        _fail(path, [_of_wandb(dict(item), known) for item in error.errors()])
    problems: list[str] = []
    domains = dict(read_domains(keys.parameters, problems))
    if keys.method == "grid":
        domains = {key: counted(domain) for key, domain in domains.items()}
    config, overrides = _configuration(keys, problems)
    problems += _disagreements(keys, domains)
    if problems:
        _fail(path, problems)
    seeds = domains.pop("seed", Choice(()))
    assert isinstance(seeds, Choice)
    name = keys.name or Path(path).stem
    sweep = Sweep(name, keys, domains, seeds.values, config, overrides, raw)
    fixed = [f"seed={seeds.values[0]}"] if seeds.values else []
    for setting in _samples(sweep):
        sweep.load(setting, fixed)
    return replace(
        sweep,
        domains={key: _distinct(sweep, key, domain, fixed) for key, domain in domains.items()},
        seeds=distinct(seeds.values, seeds.values),
    )


def _distinct(sweep: Sweep, key: str, domain: Domain, fixed: Sequence[str]) -> Domain:
    """A choice with each value once, as the configuration has it: 1 and 1.0 are one rate."""
    if isinstance(domain, Range):
        return domain
    first = {other: _ends(of)[0] for other, of in sweep.domains.items()}
    configs = [sweep.load(first | {key: value}, fixed) for value in domain.values]
    return Choice(distinct(domain.values, [attrgetter(key)(config) for config in configs]))


def _ends(domain: Domain) -> Sequence[Any]:
    """All values of a choice, both ends of a range."""
    return domain.values if isinstance(domain, Choice) else (domain.low, domain.high)


def _fail(path: str | Path, problems: list[str]) -> None:
    head = f"{path}: {len(problems)} error{'s' if len(problems) > 1 else ''} in the sweep"
    raise ConfigError("\n  ".join([head, *problems]))


def _of_wandb(error: Mapping[str, Any], known: Sequence[str]) -> str:
    key, value = str(error["loc"][-1]), error["input"]
    for name in (key, value):
        if isinstance(name, str) and name in ONLY_ON_WANDB:
            path = ".".join(str(part) for part in error["loc"])
            return f"{path} must be left to W&B's server: {name!r} is not supported here"
    return describe(error, known)


def _disagreements(keys: SweepFile, domains: Mapping[str, Domain]) -> Iterator[str]:
    if not Path(keys.program).is_file():
        yield f"program must be an existing file, got {keys.program!r}"
    if not keys.metric.name.startswith("target/"):
        yield (
            "metric.name must be measured on the target set, as target/loss, got "
            f"{keys.metric.name!r}; what selects must not be the test set"
        )
    if keys.method == "grid":
        for key, domain in domains.items():
            if isinstance(domain, Range):  # one that can be counted is a choice by now
                yield f"parameters.{key} must have values in a grid, got a range"
    elif keys.run_cap is None:
        yield f"run_cap must be given when method is {keys.method}, got None; how many cells?"
    for key in sorted(domains.keys() & _OWN):
        if len(_ends(domains[key])) > 1:
            yield f"parameters.{key} must have one value: each run of a sweep is given its own"
    seeds = domains.get("seed", Choice((0,)))
    if not isinstance(seeds, Choice) or not all(isinstance(seed, int) for seed in seeds.values):
        yield "parameters.seed must have integer values, each of which every cell is run with"


def _configuration(keys: SweepFile, problems: list[str]) -> tuple[Path, tuple[str, ...]]:
    """The YAML and the overrides in a sweep's command."""
    rest = [word for word in keys.command if word not in _MACROS and word != "python"]
    configs = [word for word in rest if is_config(word)]
    others = [word for word in rest if word not in configs and "=" not in word]
    if others or len(configs) != 1 or _MACROS[2] not in keys.command:
        at = f"{others[0]!r} in it" if others else list(keys.command)
        problems.append(f"command must be {_COMMAND}, with key=value where needed, got {at}")
        return Path(), ()
    if _MACROS[3] not in keys.command:
        problems.append(f"command must hold {_MACROS[3]}, where the parameters go")
    try:
        config = Path(str(expanded(configs[0])))
    except PydanticCustomError as error:
        problems.append(f"command {error.message()}, got {configs[0]!r} in it")
        return Path(), ()
    return config, tuple(word for word in rest if "=" in word)


def is_config(word: str) -> bool:
    """Whether a word of a sweep's command is the YAML of the runs."""
    return "=" not in word and word.endswith((".yaml", ".yml"))


def _samples(sweep: Sweep) -> list[dict[str, Any]]:
    """Settings to check: a whole grid, else every value, and both ends of a range, once."""
    if sweep.keys.method == "grid":
        return sweep.grid()
    ends = {key: _ends(domain) for key, domain in sweep.domains.items()}
    first = {key: values[0] for key, values in ends.items()}
    return [first | {key: value} for key, values in ends.items() for value in values]
