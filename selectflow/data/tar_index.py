"""Where the members of a tar file lie, found from its headers without reading the contents."""

import hashlib
import os
import re
import tarfile
from collections.abc import Iterator
from io import FileIO
from typing import NamedTuple

import numpy as np

_BLOCK = 512
_WINDOW = 1 << 18  # bytes
_END = bytes(_BLOCK)
_FILE, _DIRECTORY, _PAX = (b"0", b"\0"), b"5", b"x"
_PAX_KEY = re.compile(rb"\d+ ([^=\n]+)=")
_HARMLESS = {b"mtime", b"atime", b"ctime", b"uid", b"gid", b"uname", b"gname"}
_LONG = 1 << 16  # bytes of an extended header that are looked at
_BAD_LETTERS = "backslashreplace"  # bytes that are no UTF-8 stay apart, and can be stored as text
_META = re.compile(r"__[^/]*__($|/)")  # WebDataset's rule


_NO_FILE = -1  # in place of the offset of a link, device or pipe


class Member(NamedTuple):
    """A regular file in a tar file; or a link or device, which has no contents of its own."""

    name: str
    offset: int  # of its first byte in the tar file
    size: int  # in bytes

    @property
    def is_file(self) -> bool:
        """Whether there are contents."""
        return self.offset != _NO_FILE


class Record(NamedTuple):
    """Consecutive members of one key: by WebDataset's rule the name up to its first dot."""

    key: str
    members: dict[str, Member]  # by what follows the dot, in lower case


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension, as it is written, of a member's name; None: it is no part of a sample."""
    start = name.rfind("/") + 1
    dot = name.find(".", start)
    if dot <= start or (name.startswith("__") and _META.match(name)):
        return None
    return name[:dot], name[dot + 1 :]


def scan(file: FileIO) -> tuple[list[Record], str]:
    """The records in a tar file, in stored order, and the sha256 of the file.

    Raises:
        ValueError: the file is damaged, or its members of one key are not consecutive and distinct.
    """
    records: dict[str, Record] = {}
    last = None
    for member in _list(file, _WINDOW):
        named = split_name(member.name)
        if named is None:
            continue
        key, extension = named[0], named[1].lower()
        if last is None or key != last.key:
            if key in records:
                raise ValueError(f"member {member.name!r} of a key that came before")
            last = records[key] = Record(key, {})
        if extension in last.members:
            raise ValueError(f"member {member.name!r} of a key that came before")
        last.members[extension] = member
    file.seek(0)
    return list(records.values()), hashlib.file_digest(file, "sha256").hexdigest()


def list_members(file: FileIO, window: int = _WINDOW) -> list[Member]:
    """The regular files in an uncompressed tar file, in stored order.

    Plain headers are read here, some eight times as fast as by `tarfile`, which reads the rest:
    long names, sizes above 8 GiB, links.

    Args:
        file: an open file; its position may change.
        window: bytes read at once, >= 512.

    Raises:
        ValueError: the file is not a whole, undamaged tar file, or holds more after its end mark.
    """
    return [member for member in _list(file, window) if member.is_file]


def _list(file: FileIO, window: int) -> list[Member]:
    """As `list_members`, with links and devices."""
    headers, places = [], []  # of regular files: header, offset and size of the contents
    try:
        for block, offset, length in _headers(file, window):
            kind = block[156:157]
            if kind in _FILE:
                places.append((offset, length))
                headers.append(block)
            elif kind == _PAX:
                keys = set(_PAX_KEY.findall(os.pread(file.fileno(), min(length, _LONG), offset)))
                if length > _LONG or not keys <= _HARMLESS:
                    return _list_by_tarfile(file)
                _check_sums([block])
            elif kind == _DIRECTORY:
                _check_sums([block])
            else:
                return _list_by_tarfile(file)
    except _DamagedError as error:
        after = f"after member {_name(headers[-1])!r}" if headers else "at its start"
        raise ValueError(f"{error} {after}") from error
    _check_sums(headers)
    names = map(_name, headers)
    return [Member(name, *place) for name, place in zip(names, places, strict=True)]


class _DamagedError(ValueError):
    """A header that cannot be read; the caller knows which member came before it."""


def _headers(file: FileIO, window: int) -> Iterator[tuple[bytes, int, int]]:
    """Each header of a tar file, and the offset and size of its member's contents."""
    descriptor, size = file.fileno(), os.fstat(file.fileno()).st_size
    data, start, offset = b"", 0, 0  # what was read last, and from where
    while True:
        at = offset - start
        if at + _BLOCK > len(data):
            data, start, at = os.pread(descriptor, window, offset), offset, 0
        block = data[at : at + _BLOCK]
        if block == _END:
            _check_end(file, offset)
            return
        if len(block) < _BLOCK:
            raise _DamagedError(f"{size} bytes without an end mark")
        try:
            length = _octal(block[124:136])
        except ValueError:
            raise _DamagedError("a damaged header") from None
        if offset + _BLOCK + length > size:
            raise ValueError(f"{size} bytes, which end inside member {_name(block)!r}")
        yield block, offset + _BLOCK, length
        offset += _BLOCK - length // -_BLOCK * _BLOCK


def _name(block: bytes) -> str:
    name = block[:100].partition(b"\0")[0]
    prefix = block[345:500].partition(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", _BAD_LETTERS)


def _check_end(file: FileIO, offset: int) -> None:
    """Refuse anything but zeros, at least a block of them, from `offset` on."""
    at = offset
    while data := os.pread(file.fileno(), _WINDOW, at):
        if at == offset and len(data) >= _BLOCK and data[:_BLOCK] != _END:
            raise _DamagedError("a damaged header")
        if data != bytes(len(data)):
            raise ValueError("further bytes after its end mark, as where files are joined by cat")
        at += len(data)
    if at - offset < _BLOCK:
        raise _DamagedError(f"{at} bytes without an end mark")


def _octal(digits: bytes) -> int:
    if digits[0] & 0x80:  # a size above 8 GiB, in base 256
        return int.from_bytes(digits[1:], "big")
    text = digits.strip(b"\0 ")
    if not text.isdigit():  # `int` alone would take a sign and more
        raise ValueError(f"{digits!r} is no octal number")
    return int(text, 8)


def _check_sums(headers: list[bytes]) -> None:
    if not headers:
        return
    blocks = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, _BLOCK)
    # the sum is taken as if its own eight bytes were spaces
    sums = blocks.sum(1, dtype=np.int64) - blocks[:, 148:156].sum(1, dtype=np.int64) + 8 * 32
    for block, total in zip(headers, sums.tolist(), strict=True):
        try:
            is_right = _octal(block[148:156]) == total
        except ValueError:
            is_right = False
        if not is_right:
            raise ValueError(f"a damaged header of member {_name(block)!r}")


def _list_by_tarfile(file: FileIO) -> list[Member]:
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors=_BAD_LETTERS) as tar:
            members = [info for info in tar if not info.isdir()]
    except Exception as error:  # damaged bytes: tarfile documents no closed list of errors
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if sparse := [info.name for info in members if info.issparse()]:
        raise ValueError(f"a sparse member {sparse[0]!r}")
    try:
        _check_end(file, tar.offset)  # tarfile takes a damaged header for the end
    except _DamagedError as error:
        where = f"after member {members[-1].name!r}" if members else "at its start"
        raise ValueError(f"{error} {where}") from error
    return [
        Member(info.name, info.offset_data, info.size)
        if info.isreg()
        else Member(info.name, _NO_FILE, 0)
        for info in members
    ]
