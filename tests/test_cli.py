"""The command line: its help, what it refuses, and options that may have no value."""

import subprocess
import sys

import pytest
from synthetic_runs import make_run

from selectflow.cli import main

COMMANDS = [
    [], ["shards"], ["shards", "make"], ["shards", "verify"], ["shards", "ls"], ["shards", "head"],
    ["select"], ["select", "write-shards"], ["compare"], ["audit"], ["tune"], ["schema"],
]  # fmt: skip


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_help_in_plain_text(words, capsys):
    for flag in ("-h", "--help"):
        assert main([*words, flag]) == 0
        text = capsys.readouterr().out
        assert text.startswith(" ".join(["Usage: selectflow", *words]))
        assert text.isascii()  # no boxes


def test_help_shows_the_defaults(capsys):
    main(["shards", "make", "-h"])
    assert "Seed of random choices.  [default: 0]" in capsys.readouterr().out
    main(["compare", "-h"])
    assert "[default: test/loss]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Missing command"),
        (["shard"], "No such command 'shard'"),
        (["compare"], "Missing argument 'RUN'"),
        (["shards", "make", "digits"], "Missing option '--root'"),
        (["shards", "head", "d", "--counts", "1"], "No such option: --counts"),
        (["shards", "head", "d", "--count", "few"], "argument --count: "),
        (["shards", "make", "digit", "--root", "d"], "argument DATASET: must be digits, torchv"),
        (["compare", "r", "--wandb", "of"], "'of' is not one of 'online', 'offline'"),
        (["tune", "s", "--local", "--wandb"], "argument --wandb: not allowed with argument --loc"),
        (["tune", "s", "--count", "0"], "argument --count: must be an integer >= 1, got '0'"),
    ],
)
def test_arguments_that_cannot_be_read(words, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err


@pytest.mark.parametrize(
    ("words", "mode"),
    [
        ([], None),
        (["--wandb"], "online"),
        (["--wandb", "--partial"], "online"),
        (["--wandb", "offline"], "offline"),
        (["--wandb=offline"], "offline"),
    ],
)
def test_a_comparison_is_logged_online_unless_told_otherwise(words, mode, tmp_path, monkeypatch):
    modes = []
    monkeypatch.setattr(
        "selectflow.run.wandb.log_report", lambda *_, mode, **__: modes.append(mode)
    )
    monkeypatch.setattr("selectflow.report.page.write_outputs", lambda *_: [])  # pictures
    run = make_run(tmp_path / "run", [0.5]).folder
    assert main(["compare", str(run), "--out", str(tmp_path), *words]) == 0
    assert modes == ([mode] if mode else [])


def test_a_defect_keeps_its_trace(monkeypatch):
    def broken():
        raise ValueError("not one of ours")

    monkeypatch.setattr("selectflow.run.config.json_schema", broken)
    with pytest.raises(ValueError, match="not one of ours"):
        main(["schema"])


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "selectflow", "schema", "-h"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith("Usage: selectflow schema")
