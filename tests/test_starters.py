"""What a user of the package begins with: init, doctor, and completion in the shell."""

import os
import runpy
from importlib import metadata
from pathlib import Path

import pytest

from selectflow.cli import main
from selectflow.run import doctor
from selectflow.run.config import load
from selectflow.run.starters import KINDS, write_starter

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("kind", KINDS)
def test_starters_are_the_repositorys_own_files(kind, tmp_path):
    written = write_starter(kind, tmp_path / "mine")
    assert written[0].parent.name == "trainers"
    for path in written:
        own = path.relative_to(tmp_path / "mine")
        assert path.read_bytes() == (ROOT / own).read_bytes()
        assert not path.is_symlink()
    for path in written[1:]:
        if not path.name.startswith("sweep_"):
            trainer = written[0].relative_to(tmp_path / "mine")
            assert f"python {trainer} configs/{path.name}" in path.read_text()
            load(path)


def test_there_is_one_copy_in_the_repository():
    for name in ("trainers", "configs"):
        assert (ROOT / "selectflow" / "starters" / name).resolve() == ROOT / name


def test_init_writes_what_runs_in_that_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "vision"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("to run it: python trainers/vision.py configs/digits_online.yaml\n")
    trainer = runpy.run_path("trainers/vision.py")["main"]
    options = ["steps=2", "eval_every=2", "track.wandb=disabled"]
    assert trainer(["configs/digits_online.yaml", *options]) == 0
    assert (tmp_path / "runs" / "digits_online-s0" / "summary.json").is_file()


def test_init_replaces_nothing(tmp_path, capsys):
    mine = tmp_path / "configs" / "digits_online.yaml"
    mine.parent.mkdir()
    mine.write_text("name: mine\n")
    assert main(["init", "vision", str(tmp_path)]) == 2
    assert f"got {mine}; name another folder, or move them away" in capsys.readouterr().err
    assert mine.read_text() == "name: mine\n"
    assert not (tmp_path / "trainers").exists()
    with pytest.raises(SystemExit):
        main(["init", "audio"])
    assert "'audio' is not one of 'vision', 'language'" in capsys.readouterr().err


def test_doctor_says_what_is_missing_for_which_extra(monkeypatch, capsys):
    held = {"selectflow": "0.1.0", "torch": "2.5.1", "fsspec": "2025.1", "optuna": "4.1"}
    needed = {
        "selectflow": [
            "torch>=2.6", "numpy>=1.26; python_version < '3'", 'optuna>=4.0; extra == "tune"',
            'fsspec[http]>=2024.6; extra == "remote"', 's3fs; extra == "remote"',
        ],
        "fsspec": ["aiohttp>=3; extra == 'http'", "dask; extra == 'dask'"],
    }  # fmt: skip

    def version(name):
        if name not in held:
            raise metadata.PackageNotFoundError(name)
        return held[name]

    class Extras:
        def get_all(self, _):
            return ["remote", "tune", "dev"]

    monkeypatch.setattr(doctor.metadata, "version", version)
    monkeypatch.setattr(doctor.metadata, "requires", needed.get)
    monkeypatch.setattr(doctor.metadata, "metadata", lambda _: Extras())
    assert main(["doctor"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    at = lines.index("packages") + 1
    assert lines[at:] == [
        "needed: lacks torch>=2.6 (has 2.5.1); pip install 'selectflow'",
        "extra remote: lacks aiohttp>=3, s3fs; pip install 'selectflow[remote]'",
        "extra tune: all there",
    ]


def test_doctor_says_versions_devices_and_precision(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "versions\n  selectflow " in out
    assert "devices\n  cpu: " in out
    assert "bfloat16" in out


def test_doctor_without_an_installation(monkeypatch):
    def requires(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "requires", requires)
    assert "not installed; pip install -e ." in list(doctor.examine())[-1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("selectflow do", "doctor"),
        ("selectflow shards ver", "verify"),
        ("selectflow tune --jo", "--jobs"),
    ],
)
def test_the_shell_completes(monkeypatch, capsys, words, expected):
    monkeypatch.setitem(os.environ, "_SELECTFLOW_COMPLETE", "complete_bash")
    monkeypatch.setitem(os.environ, "COMP_WORDS", words)
    monkeypatch.setitem(os.environ, "COMP_CWORD", str(len(words.split()) - 1))
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 0
    assert capsys.readouterr().out.split() == [expected]
