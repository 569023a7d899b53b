"""``checksum.txt``: what sha256sum prints, a line a file."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping

from distrust.errors import CorruptCheckpoint, quote_untrusted, shorten

MAX_CHECKSUMS_BYTES = 1 << 20
_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](?:\./)?([^\r\n]+)", re.ASCII)
_PIECE_BYTES = 1 << 20


def parse(raw: bytes, what: str) -> dict[str, str]:
    """The digest of each file by its name, which is a plain one: nothing elsewhere is ever looked at.

    Raises:
        CorruptCheckpoint: naming the first line that is none of sha256sum's.
    """
    try:
        lines = str(raw, "utf-8-sig").splitlines()  # Windows writes a mark (a BOM) before the first one
    except UnicodeDecodeError:
        raise CorruptCheckpoint(f"{what} is not UTF-8") from None
    found: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise CorruptCheckpoint(f"{what}, line {number}: not '<64 hex digits>  <file>'")
        digest, name = match.groups()
        if "/" in name or "\\" in name or "\0" in name or name in (".", ".."):
            raise CorruptCheckpoint(
                f"{what}, line {number}: {shorten(name)!r} is no plain file name; "
                "nothing outside the folder is read"
            )
        if name in found:
            raise CorruptCheckpoint(f"{what}, line {number}: {shorten(name)!r} stands there twice")
        found[name] = digest.lower()
    return found


def of_file(descriptor: int) -> str:
    """The SHA-256 of a file, from its beginning to its end, in hexadecimal."""
    digest, offset = hashlib.sha256(), 0
    while piece := os.pread(descriptor, _PIECE_BYTES, offset):
        digest.update(piece)
        offset += len(piece)
    return digest.hexdigest()


def compare(name: str, expected: Mapping[str, str], found: str) -> None:
    """Check a file's digest, where one is expected.

    Raises:
        CorruptCheckpoint: naming the file and both digests.
    """
    wanted = expected.get(name, found)
    if wanted != found:
        raise CorruptCheckpoint(
            f"{quote_untrusted(name)} is not what checksum.txt says: expected {wanted}, found {found}"
        )
