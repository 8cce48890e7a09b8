"""A terminal without a character of the output: it is shown as Python source, and ends nothing."""

import contextlib
import io

from selectflow.cli import main
from selectflow.run.main import trainer_main


def written(run):
    """What a terminal in ASCII gets."""
    file = io.BytesIO()
    with io.TextIOWrapper(file, "ascii") as terminal, contextlib.redirect_stdout(terminal):
        assert run() == 0
        print("± …")
        terminal.flush()
        return file.getvalue().decode()


def test_every_program_prints_every_character():
    usage = written(lambda: trainer_main(["-h"], None, "usage: 1 ± 2"))
    assert usage == "usage: 1 \\xb1 2\n\\xb1 \\u2026\n"
    assert written(lambda: main(["schema"])).endswith("}\n\\xb1 \\u2026\n")
