"""Remote shards: fetched whole, and kept on the local disk up to a size."""

import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from selectflow.core.files import atomic_file
from selectflow.data.manifest import DataError

_PIPE = "pipe:"


def is_remote(url: str) -> bool:
    """Whether a shard has to be fetched before it can be read."""
    return "://" in url or url.startswith(_PIPE)


def _default_directory() -> Path:
    return Path(os.environ.get("SELECTFLOW_CACHE", "~/.cache/selectflow")).expanduser()


@dataclass(frozen=True)
class Cache:
    """Where fetched shards are kept, and how they are fetched.

    Several processes may share a directory: a file appears only once it is whole. The files used
    longest ago are removed first.

    Args:
        directory: made if missing; by default $SELECTFLOW_CACHE, else ~/.cache/selectflow.
        max_gib: size above which shards are removed, in GiB, > 0; let it hold twice the shards
            that are shuffled together.
        attempts: times a shard is tried, >= 1.
        backoff_s: seconds before the second attempt, doubled before each further one, >= 0.
        timeout_s: an attempt over http or https ends once no byte has come for this many seconds,
            > 0; other file systems have limits of their own.
        allow_pipe: True runs the shell command of a `pipe:` source.

    Raises:
        DataError: an argument out of its range.
    """

    directory: Path = field(default_factory=_default_directory)
    max_gib: float = 20.0
    attempts: int = 4
    backoff_s: float = 0.5
    timeout_s: float = 60.0
    allow_pipe: bool = False

    def __post_init__(self) -> None:
        is_right = self.max_gib > 0 and self.attempts >= 1 and self.backoff_s >= 0
        if not (is_right and self.timeout_s > 0):
            raise DataError(
                "max_gib must be > 0, attempts >= 1, backoff_s >= 0 and timeout_s > 0, got "
                f"{self.max_gib}, {self.attempts}, {self.backoff_s} and {self.timeout_s}; see Cache"
            )

    def fetch(self, url: str) -> Path:
        """The local copy of a shard, fetched if there is none.

        Raises:
            DataError: it cannot be fetched in all attempts, or it is a `pipe:` that is not
                allowed. Names the shard.
        """
        path = self._path(url)
        if is_new := not path.exists():
            self._fetch(url, path)
        # the time of access is now; a reader tells by the time of change what it has checked
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
        if is_new:
            self._shrink()
        return path

    def fetch_anew(self, url: str) -> Path:
        """As `fetch`, of a file that may have changed since it was last fetched."""
        self.forget(url)
        return self.fetch(url)

    def forget(self, url: str) -> None:
        """Remove the local copy of a shard, such as a damaged one."""
        self._path(url).unlink(missing_ok=True)

    def _path(self, url: str) -> Path:
        digest = hashlib.sha256(url.encode()).hexdigest()
        return self.directory / f"{digest[:40]}.shard"

    def _fetch(self, url: str, path: Path) -> None:
        if url.startswith(_PIPE) and not self.allow_pipe:
            raise DataError(
                f"source must not run commands, got {url!r}; allow them by Cache(allow_pipe=True)"
            )
        self.directory.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, self.attempts + 1):
            try:
                with atomic_file(path) as file, _open(url, self.timeout_s) as stream:
                    shutil.copyfileobj(stream, file, 1 << 20)
                return
            except ImportError as error:
                raise DataError(
                    f"shard {url} must be of a file system that is installed, got {error}; "
                    "pip install 'selectflow[remote]'"
                ) from error
            except Exception as error:  # each file system has errors of its own
                if attempt == self.attempts or isinstance(error, FileNotFoundError):
                    raise DataError(
                        f"shard {url} must be readable, got {type(error).__name__}: {error} in "
                        f"attempt {attempt}; check the address and the connection"
                    ) from error
                time.sleep(self.backoff_s * 2 ** (attempt - 1))

    def _shrink(self) -> None:
        (_, used, _), *others = sorted(_shards(self.directory), reverse=True)
        for _, size, path in others:
            used += size
            if used > self.max_gib * 2**30:
                path.unlink(missing_ok=True)


def _shards(directory: Path) -> Iterator[tuple[float, int, Path]]:
    for path in directory.glob("*.shard"):
        try:
            stat = path.stat()
        except FileNotFoundError:  # removed by another process
            continue
        yield stat.st_atime, stat.st_size, path


@contextmanager
def _open(url: str, timeout_s: float) -> Iterator[IO[bytes]]:
    if not url.startswith(_PIPE):
        import fsspec  # noqa: PLC0415 - only remote data need it

        options: dict[str, Any] = {}
        if url.startswith(("http://", "https://")):
            from aiohttp import ClientTimeout  # noqa: PLC0415

            # aiohttp's default is five minutes in all: too long for a server that hangs, too short
            # for a slow one
            timeout = ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s)
            options["client_kwargs"] = {"timeout": timeout}
        with fsspec.open(url, "rb", **options) as stream:
            yield stream
        return
    command = url.removeprefix(_PIPE)
    with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield process.stdout
    if process.returncode:
        raise OSError(f"exit status {process.returncode}")
