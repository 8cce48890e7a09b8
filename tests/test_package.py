"""The package: built as sdist and wheel, installed into an empty environment, run from there.

The packages that it needs are borrowed from this environment, which takes no network.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta as b; print(b.build_{}(sys.argv[1]))"
# the README's loop, in a program of one's own
LOOP = """
import re, sys, pathlib, torch, selectflow
from torch import nn
assert pathlib.Path(selectflow.__file__).is_relative_to(sys.prefix), selectflow.__file__
torch.manual_seed(0)
def batch(num):
    x = torch.randn(num, 8)
    return {"x": x, "y": (x[:, 0] > 0).long()}
model = nn.Linear(8, 2)
names = {
    "model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.1),
    "loss_fn": lambda m, b: nn.functional.cross_entropy(m(b["x"]), b["y"], reduction="none"),
    "target_batches": [batch(64)], "pools": [batch(32) for _ in range(30)],
}
code = re.search("```python\\n(.*?)```", pathlib.Path(sys.argv[1]).read_text("utf-8"), re.DOTALL)[1]
exec(code, names)
print("loss", float(names["loss_fn"](model, batch(256)).mean().detach()))
"""


def built(kind, source, out):
    """The path of an sdist or a wheel of a source tree."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BUILD.format(kind), out],
        cwd=source, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """The sdist, and the wheel that is made of what is in it."""
    folder = tmp_path_factory.mktemp("built")
    (folder / "source").mkdir()
    tracked = subprocess.run(
        ["git", "ls-files", "selectflow", "trainers", "configs", "pyproject.toml", "README.md",
         "LICENSE"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    for name in tracked:
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / "source" / name, follow_symlinks=False)
    sdist = built("sdist", folder / "source", folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return sdist, built("wheel", unpacked, folder)


@pytest.fixture(scope="module")
def environment(packages, tmp_path_factory):
    """The folder of an environment with the wheel alone, and with what it needs from here."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder / "env", symlinks=True)
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    # of a path that a .pth names no .pth files are read: no editable install comes along
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python",
         folder / "env" / "bin" / "python", "install", "--quiet", "--no-deps", "--no-index",
         packages[1]],
        check=True,
    )  # fmt: skip
    return folder


def run(folder, *words):
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env["PATH"] = f"{folder / 'env' / 'bin'}{os.pathsep}{env['PATH']}"
    done = subprocess.run(
        list(map(str, words)), cwd=folder, env=env | {"OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_has_the_data_and_nothing_else(packages):
    names = set(zipfile.ZipFile(packages[1]).namelist())
    package = {name for name in names if name.startswith("selectflow/")}
    assert {name.split("/")[0] for name in names} == {"selectflow", "selectflow-0.1.0.dist-info"}
    expected = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "selectflow").rglob("*")
        if path.suffix in (".py", ".html", ".css", ".js") or path.name == "py.typed"
    }
    for name in ("trainers/*.py", "configs/*.yaml"):
        expected |= {f"selectflow/starters/{path.relative_to(ROOT)}" for path in ROOT.glob(name)}
    assert package == expected


def test_the_readmes_loop_runs_from_the_package(environment):
    out = run(environment, "python", "-W", "error", "-c", LOOP, ROOT / "README.md")
    assert float(out.split()[1]) < 0.3


def test_the_commands_run_from_the_package(environment):
    assert "doctor" in run(environment, "selectflow", "--help")
    config = run(environment, "selectflow", "init", "vision").split()[-1]
    options = ("steps=4", "eval_every=2", "track.wandb=disabled")
    run(environment, "python", "trainers/vision.py", config, *options)
    run(environment, "selectflow", "compare", "runs/digits_online-s0", "--out", "report")
    assert (environment / "report" / "compare.html").is_file()
