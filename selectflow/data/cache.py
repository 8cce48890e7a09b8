"""Remote files on the local disk: fetched whole, kept by version up to a size, held while read."""

import hashlib
import json
import logging
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import mktime_tz, parsedate_tz
from functools import cache
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

from selectflow.core.files import atomic_file
from selectflow.data.manifest import DataError
from selectflow.data.urls import PIPE, is_http

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_MARKS = ("ETag", "Last-Modified", "Content-MD5", "Digest")  # by which a web server tells versions
_SETTLED_S = 60.0  # as RFC 9110, 8.8.2.2, advises
_NUM_LOCKS = 64  # files that share one wait for each other
_STALE_S = 24 * 3600.0  # a file in the making that old was left by a process that died


def _default_directory() -> Path:
    named = os.environ.get("SELECTFLOW_CACHE") or "~/.cache/selectflow"
    try:
        return Path(named).expanduser()
    except RuntimeError:  # nobody's home, as in some containers
        return Path(tempfile.gettempdir(), f"selectflow-{os.getuid()}")


@dataclass(frozen=True)
class Cache:
    """Where remote files are kept, and how they are fetched.

    Several processes may share a directory: a file appears only once it is whole, and one that is
    open stays readable when it is removed. The files used longest ago are removed first.

    A file is kept under its URL and version, so that one that is replaced at its URL is fetched
    again: by the sha256 of a manifest, else by what its server tells when the data are opened, such
    as size and ETag or date. What tells no version, such as a command, is fetched at each opening.

    Args:
        directory: made if missing; by default $SELECTFLOW_CACHE, else ~/.cache/selectflow.
        max_gib: size above which files are removed, in GiB, > 0; let it hold twice the shards
            that are shuffled together.
        attempts: times a file is tried, >= 1.
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
        object.__setattr__(self, "directory", Path(self.directory))
        is_right = self.max_gib > 0 and self.attempts >= 1 and self.backoff_s >= 0
        if not (is_right and self.timeout_s > 0):
            raise DataError(
                "max_gib must be > 0, attempts >= 1, backoff_s >= 0 and timeout_s > 0, got "
                f"{self.max_gib}, {self.attempts}, {self.backoff_s} and {self.timeout_s}; see Cache"
            )

    def version(self, url: str) -> str:
        """What tells this version of a remote file from others at its URL; "": nothing does.

        Where the server cannot be asked, the version of the newest copy, by a warning.
        """
        if url.startswith(PIPE):
            return ""
        try:
            files, path = _file_system(url, self.timeout_s)
            if not is_http(url):
                return _digest(str(files.ukey(path)))
            return _version_on_the_web(files.info(path))
        except Exception as error:  # each file system has errors of its own
            kept = self._newest_version(url)
            if kept:  # else fetching it says what is wrong
                _log.warning(
                    "shard %s cannot be asked whether it has changed (%s: %s): the copy in %s is "
                    "used", url, type(error).__name__, error, self.directory,
                )  # fmt: skip
            return kept

    def _newest_version(self, url: str) -> str:
        """The version of the copy that was fetched last; "": there is none of a version."""
        found = [(0.0, "")]
        for path in self.directory.glob(f"{_digest(url)}-?*.shard"):
            with suppress(FileNotFoundError):  # removed by another process
                found.append((path.stat().st_mtime, path.stem.partition("-")[2]))
        return max(found)[1]

    def open(self, url: str, version: str = "", *, anew: bool = False) -> FileIO:
        """A remote file, fetched if there is no copy of this version, or if `anew` is true.

        It stays readable until it is closed, whatever other processes remove.

        Raises:
            DataError: it cannot be fetched in all attempts or not be kept, or it is a `pipe:` that
                is not allowed. Names the file.
        """
        path = self._path(url, version)
        file = None if anew else _reopened(path)
        if file is None:
            file = self._keep(url, path, anew)
            self._shrink(path)
        return file

    def read(self, url: str) -> bytes:
        """The contents of a small file, which is fetched each time and not kept.

        Raises:
            DataError: it cannot be fetched in all attempts.
        """

        def read() -> bytes:
            files, path = _file_system(url, self.timeout_s)
            return bytes(files.cat_file(path))

        return self._try(url, read)

    def remember(self, name: object, value: object) -> None:
        """Keep a small value of plain types, to be found by its name, another such value."""
        path = self._note(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as file:
                file.write(json.dumps(value).encode())
        except OSError as error:
            _tell_once(self.directory, error.strerror or str(error))

    def recall(self, name: object) -> Any:
        """The value that was kept; None if there is none that can be read."""
        try:
            return json.loads(self._note(name).read_bytes())
        except (OSError, ValueError):  # missing, or left empty by a machine that went down
            return None

    def forget(self, name: object) -> bool:
        """Drop the value of that name; whether there was one."""
        try:
            self._note(name).unlink()
        except OSError:
            return False
        return True

    def _path(self, url: str, version: str) -> Path:
        return self.directory / f"{_digest(url)}-{version[:40]}.shard"

    def _note(self, name: object) -> Path:
        return self.directory / f"{_digest(json.dumps(name))}.json"

    def _keep(self, url: str, path: Path, anew: bool) -> FileIO:
        """The file, fetched to its place; others that want it wait, and find it there."""
        if url.startswith(PIPE) and not self.allow_pipe:
            raise DataError(
                f"source must not run commands, got {url!r}; allow them by Cache(allow_pipe=True)"
            )

        def fetch() -> FileIO:
            with atomic_file(path, durable=True) as file:  # a part may look like a whole shard
                _copy(url, Path(file.name), self.timeout_s)
                # opened before it has its name, by which another process can remove it
                return FileIO(file.name)

        locks = self.directory / "locks"
        try:
            locks.mkdir(parents=True, exist_ok=True)
            name = f"{int(path.name[:8], 16) % _NUM_LOCKS:02}.lock"
            with FileLock(locks / name, mode=0o666, poll_interval=0.01):
                return (None if anew else _reopened(path)) or self._try(url, fetch)
        except OSError as error:
            raise DataError(
                f"shard {url} must be kept in {self.directory}, got {error.strerror}; name a "
                "directory with room for it by SELECTFLOW_CACHE or Cache(directory=...), or lower "
                "max_gib where the disk is smaller"
            ) from error

    def _try(self, url: str, attempt: Callable[[], _T]) -> _T:
        for number in range(1, self.attempts + 1):
            try:
                return attempt()
            except ImportError as error:
                raise DataError(
                    f"shard {url} must be of a file system that is installed, got {error}; "
                    "pip install 'selectflow[remote]'"
                ) from error
            except Exception as error:  # each file system has errors of its own
                if _is_inside(error, self.directory):
                    raise
                if number == self.attempts or isinstance(error, FileNotFoundError):
                    raise DataError(
                        f"shard {url} must be readable, got {type(error).__name__}: {error} in "
                        f"attempt {number}; check the address and the connection"
                    ) from error
                time.sleep(self.backoff_s * 2 ** (number - 1))
        raise AssertionError("attempts is at least 1")

    def _shrink(self, kept: Path) -> None:
        """Remove what was used longest ago beyond the limit, but not `kept`."""
        files = []
        for path in self.directory.glob("*.shard"):
            with suppress(FileNotFoundError):  # removed by another process
                stat = path.stat()
                files.append((path == kept, stat.st_atime_ns, stat.st_size, path))
        used = 0
        for is_kept, _, size, path in sorted(files, reverse=True):
            used += size
            if used > self.max_gib * 2**30 and not is_kept:
                path.unlink(missing_ok=True)
        for path in self.directory.glob(".*.tmp"):
            with suppress(FileNotFoundError):
                if path.stat().st_mtime < time.time() - _STALE_S:
                    path.unlink()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def _version_on_the_web(told: dict[str, Any]) -> str:
    """What a web server tells of a version, which fsspec leaves to its callers; "": nothing."""
    marks = [told.get(name) for name in _MARKS]
    if date := told.get("Last-Modified"):
        # dates are in whole seconds, and many an ETag is made of date and size: those of a file
        # that has just changed may be those of its next change, too
        changed = parsedate_tz(date)
        if changed is None or time.time() < mktime_tz(changed) + _SETTLED_S:
            return ""
    return _digest(json.dumps([told.get("size"), *marks])) if any(marks) else ""


@cache
def _tell_once(directory: Path, reason: str) -> None:  # and not for every shard
    _log.warning(
        "what shards hold cannot be remembered in %s (%s): they are read again at each start; "
        "name a directory by SELECTFLOW_CACHE", directory, reason,
    )  # fmt: skip


def _reopened(path: Path) -> FileIO | None:
    """A copy that is there; it counts as used now."""
    try:
        file = FileIO(path)
    except OSError:
        return None
    with suppress(OSError):  # a cache that others filled may be read-only
        # the time of access; a reader tells by the time of change what it has checked
        os.utime(file.fileno(), ns=(time.time_ns(), os.fstat(file.fileno()).st_mtime_ns))
    return file


def _copy(url: str, to: Path, timeout_s: float) -> None:
    """Fetch a file front to back, or the output of a command."""
    if not url.startswith(PIPE):
        files, path = _file_system(url, timeout_s)
        files.get_file(path, str(to))
        return
    with to.open("wb") as file:
        done = subprocess.run(url.removeprefix(PIPE), shell=True, stdout=file, check=False)
    if done.returncode:
        raise OSError(f"exit status {done.returncode}")


def _file_system(url: str, timeout_s: float) -> tuple[Any, str]:
    """The file system of a URL, one of fsspec's, and the path there."""
    from fsspec.core import url_to_fs  # noqa: PLC0415 - only remote data need it

    options: dict[str, Any] = {}
    if is_http(url):
        from aiohttp import ClientTimeout  # noqa: PLC0415

        # aiohttp's default is five minutes in all: too long for a server that hangs, too short
        # for a slow one
        timeout = ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s)
        options["client_kwargs"] = {"timeout": timeout}
    scheme, mark, rest = url.partition("://")
    files, path = url_to_fs(scheme.lower() + mark + rest, **options)
    return files, str(path)


def _is_inside(error: Exception, directory: Path) -> bool:
    """Whether it comes from writing there, and not from the origin of the data."""
    name = error.filename if isinstance(error, OSError) else None
    return isinstance(name, str) and Path(name).parent == directory
