"""Files that are there whole or not at all, also when the process or the machine dies.

And a standard output that takes any character.
"""

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


@contextmanager
def atomic_file(path: Path, *, durable: bool = False) -> Iterator[IO[bytes]]:
    """Open a file for writing that takes its name only once it is whole.

    Args:
        path: final name; an existing file is replaced.
        durable: True waits until it is on the disk before it takes its name.

    Yields:
        A binary file; after an exception nothing of it is left.

    Raises:
        OSError: it cannot be written; names `path`.
    """
    # the process id keeps two writers of the same file apart, the dot hides it from readers
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in _OF_THE_DISK and error.filename is None:  # writing does not say where
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def size_on_disk(path: Path) -> int:
    """Bytes of a file, once all of them are on the disk; 0 where there is none.

    For what states how far a file is to be trusted: the file must not be lost where that is not.
    """
    if not path.exists():
        return 0
    with path.open("ab") as file:
        os.fsync(file.fileno())
        return file.tell()


def print_anything() -> None:
    """From here on, print a character that stdout cannot encode as its escape in Python source.

    A run must not end because a terminal, a pipe or a log cannot show a character of its data.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
