"""What a user writes to name data: local paths, URLs, and commands."""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote

from braceexpand import braceexpand

from selectflow.data.manifest import MANIFEST_NAME, DataError

PIPE = "pipe:"
_HTTP = re.compile("https?://", re.IGNORECASE)


def is_remote(url: str) -> bool:
    """Whether a file has to be fetched before it can be read."""
    return "://" in url or url.startswith(PIPE)


def is_http(url: str) -> bool:
    """Whether it is an address of the web."""
    return _HTTP.match(url) is not None


def plain(text: str) -> str:
    """A local path of a `file:` URL; anything else as it is.

    Raises:
        DataError: the URL is of another machine.
    """
    scheme, colon, rest = text.partition(":")
    if not colon or scheme.lower() != "file":
        return text
    if rest.startswith("//"):
        host, slash, path = rest[2:].partition("/")
        if host not in ("", "localhost"):
            raise DataError(
                f"file URL must be of this machine, file:///path, got {text!r}; "
                "write three slashes, or the path alone"
            )
        rest = slash + path
    return unquote(rest)


def expand(text: str) -> Iterator[str]:
    """The paths and URLs of a brace pattern."""
    return map(plain, braceexpand(text))


def is_listed(text: str) -> bool:
    """Whether it names shards, by a pattern or one alone, and not a directory."""
    return "{" in text or _path(text).endswith(".tar") or text.startswith(PIPE)


def root_of(source: str | Path) -> str:
    """The dataset directory, a path or URL, of a directory or its manifest."""
    path, query = _split(plain(str(source)))
    if PurePosixPath(path).name == MANIFEST_NAME:
        path = path.removesuffix(MANIFEST_NAME)
    return (path.rstrip("/") or path[:1] or ".") + query


def member(root: str, name: str) -> str:
    """The path or URL of a file in a dataset directory; a query of its URL goes with it."""
    path, query = _split(root)
    return f"{path.rstrip('/')}/{quote(name) if is_http(root) else name}{query}"


def name_of(url: str) -> str:
    """The file name of a path or URL."""
    path = _path(url)
    return PurePosixPath(unquote(path) if is_http(url) else path).name


def _path(url: str) -> str:
    return _split(url)[0]


def _split(url: str) -> tuple[str, str]:
    """A URL before its query, and the query with what follows; a local path has none."""
    at = url.find("?") if is_remote(url) and not url.startswith(PIPE) else -1
    return (url, "") if at < 0 else (url[:at], url[at:])
