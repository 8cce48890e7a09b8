"""Where the members of a tar file lie, found from its headers without reading the contents."""

import os
import re
import tarfile
from io import FileIO
from typing import NamedTuple

import numpy as np

_BLOCK = 512
_END = bytes(_BLOCK)
_FILE, _DIRECTORY, _PAX = (b"0", b"\0"), b"5", b"x"
_PAX_KEY = re.compile(rb"\d+ ([^=\n]+)=")
_HARMLESS = {b"mtime", b"atime", b"ctime", b"uid", b"gid", b"uname", b"gname"}


# WebDataset's rules: the extension starts at the first dot of the file name, `__name__` is metadata
_SAMPLE = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")
_META = re.compile(r"__[^/]*__($|/)")


class Member(NamedTuple):
    """A regular file in a tar file.

    Attributes:
        name: its whole name.
        offset: of its first byte in the tar file.
        size: its length in bytes.
    """

    name: str
    offset: int
    size: int


class Record(NamedTuple):
    """Consecutive members of one key.

    Attributes:
        key: name of the members up to the first dot.
        members: by what follows it, in lower case.
    """

    key: str
    members: dict[str, Member]


def list_records(file: FileIO) -> list[Record]:
    """The records in a tar file, in stored order; see `list_members`.

    Raises:
        ValueError: the file is damaged, a member comes twice, or a key again after another one.
    """
    records: dict[str, Record] = {}
    last = ""
    for member in list_members(file):
        match = _SAMPLE.fullmatch(member.name)
        if not match or _META.match(member.name):
            continue
        key, extension = match[1], match[2].lower()
        record = records.setdefault(key, Record(key, {}))
        if extension in record.members or (record.members and key != last):
            raise ValueError(f"member {member.name!r} of a key that came before")
        record.members[extension] = member
        last = key
    return list(records.values())


def list_members(file: FileIO) -> list[Member]:
    """The regular files in an uncompressed tar file, in stored order.

    Plain headers are read here, some ten times as fast as by `tarfile`, which reads the rest: long
    names, sizes above 8 GiB, links.

    Args:
        file: an open file; its position may change.

    Raises:
        ValueError: the file is not a whole, undamaged tar file.
    """
    descriptor, size = file.fileno(), os.fstat(file.fileno()).st_size
    members: list[Member] = []
    headers: list[bytes] = []
    offset = 0
    while (block := os.pread(descriptor, _BLOCK, offset)) != _END:
        after = f"after member {members[-1].name!r}" if members else "at its start"
        if len(block) < _BLOCK:
            raise ValueError(f"{size} bytes without an end mark {after}")
        kind, length = block[156:157], _octal(block[124:136], f"a damaged header {after}")
        start = offset + _BLOCK
        if kind in _FILE:
            members.append(Member(_name(block), start, length))
        elif kind == _PAX:
            keys = set(_PAX_KEY.findall(os.pread(descriptor, min(length, 1 << 16), start)))
            if not keys <= _HARMLESS:
                return _list_by_tarfile(file)
        elif kind != _DIRECTORY:
            return _list_by_tarfile(file)
        headers.append(block)
        if start + length > size:
            raise ValueError(f"{size} bytes, which end inside member {_name(block)!r}")
        offset = start - length // -_BLOCK * _BLOCK
    _check_sums(headers)
    return members


def _name(block: bytes) -> str:
    name = block[:100].partition(b"\0")[0]
    prefix = block[345:500].partition(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "replace")


def _octal(digits: bytes, problem: str) -> int:
    text = digits.strip(b"\0 ")
    if digits[0] & 0x80:  # a size above 8 GiB, in base 256
        return int.from_bytes(digits[1:], "big")
    if not text.isdigit() or b"8" in text or b"9" in text:
        raise ValueError(problem)
    return int(text, 8)


def _check_sums(headers: list[bytes]) -> None:
    if not headers:
        return
    blocks = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, _BLOCK)
    # the sum is taken as if its own eight bytes were spaces
    sums = blocks.sum(1, dtype=np.int64) - blocks[:, 148:156].sum(1, dtype=np.int64) + 8 * 32
    for block, total in zip(headers, sums.tolist(), strict=True):
        problem = f"a damaged header of member {_name(block)!r}"
        if _octal(block[148:156], problem) != total:
            raise ValueError(problem)


def _list_by_tarfile(file: FileIO) -> list[Member]:
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            members = [info for info in tar if info.isreg()]
    except Exception as error:  # damaged bytes: tarfile documents no closed list of errors
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if sparse := [info.name for info in members if info.issparse()]:
        raise ValueError(f"a sparse member {sparse[0]!r}")
    return [Member(info.name, info.offset_data, info.size) for info in members]
