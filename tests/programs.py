"""Our programs as from the command line, in a copy of this process: the imports are made."""

import logging
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

# what they would each import as they run
import pyarrow.parquet  # noqa: F401
import sklearn.datasets  # noqa: F401
import torch._dynamo  # noqa: F401


def run_program(path, *arguments, cwd):
    """Run a program to its end, without its warnings: status, output and errors."""
    command = [str(path), *map(str, arguments)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        pid = os.fork()
        if not pid:
            _become(command, cwd, out, err)
        _, status = os.waitpid(pid, 0)
        for file in (out, err):
            file.seek(0)
        code = os.waitstatus_to_exitcode(status)
        return subprocess.CompletedProcess(command, code, out.read(), err.read())


def _become(command, cwd, out, err):
    """Be the program, and end with it: nothing of pytest may run in this process."""
    status = 1
    try:
        sys.argv, sys.stdout, sys.stderr = command, out, err
        sys.path.insert(0, str(Path(command[0]).parent))  # as Python does for a script
        logging.root.handlers.clear()
        warnings.simplefilter("ignore")
        os.chdir(cwd)
        runpy.run_path(command[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc(file=err)
    finally:
        out.flush()
        err.flush()
        os._exit(status)
