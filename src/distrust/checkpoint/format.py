"""The file format, and the layout of a new file. Pure functions: no policy, no I/O.

A checkpoint is a safetensors file: 8 bytes of little-endian header length; a JSON header padded with spaces
so that the data begins at a multiple of 4096; then the tensors without gaps, by descending item size and then
by name, so that each is aligned to its item size. Three kinds of BLAKE3 digests verify each part alone:

- ``digests``: one for each tensor's bytes;
- ``state_digest``: over each tensor's name, dtype, shape and digest, and over ``state`` (the skeleton and the
  scalars). It identifies the state: two bit-identical runs have the same one;
- ``digest``: over the header itself, with its own 64 characters set to "0".

They detect accidental damage. They are not a signature: whoever forges a file can compute them too.

The header is canonical: sorted keys, no spaces except the padding, UTF-8. So every header of every version
begins with :data:`OPENING`, and its own digest is at a fixed position. A reader proves that a header is
canonical by re-encoding what it parsed with the one encoder, :class:`HeaderText`.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from json.encoder import encode_basestring as encode_text
from math import prod
from operator import add
from typing import Any, Literal, NamedTuple, TypeVar

from blake3 import blake3

from distrust.checkpoint.lazy import lockfree_cached_property
from distrust.errors import UnsupportedState

FORMAT = "distrust"
VERSION = 1
ALIGNMENT = 4096  # direct I/O needs page-aligned offsets, and mapped tensors aligned memory
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the bound of the safetensors library, too
MAX_DIMENSIONS = 64  # of the frameworks; it also bounds the cost of multiplying a hostile shape
MAX_SIZE = 2**63  # exclusive: every user of sizes and offsets has signed 64-bit numbers
DIGEST_CHARACTERS = 64
NO_DIGEST = "0" * DIGEST_CHARACTERS

METADATA = "__metadata__"
#: The first bytes of every header, after its length; its own digest follows.
OPENING = f'{{"{METADATA}":{{"digest":"'.encode()
#: Where a header's own digest is in the file.
DIGEST_SLICE = slice(LENGTH_BYTES + len(OPENING), LENGTH_BYTES + len(OPENING) + DIGEST_CHARACTERS)
_DIGESTS = b'","digests":"'

Kind = Literal["periodic", "final"]  # a final one is never cleaned up
Description = tuple[str, tuple[int, ...]]  # a tensor's dtype and shape
_Value = TypeVar("_Value")

#: Every dtype of the format with a whole number of bytes -> its item size.
ITEM_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


class TensorInfo(NamedTuple):
    """A tensor as the header describes it."""

    name: str
    dtype: str  # a key of ITEM_SIZES
    shape: tuple[int, ...]
    offset: int  # of its first byte, from the beginning of the file
    nbytes: int
    digest: str  # BLAKE3 of its bytes, in hexadecimal


class TensorTable:
    """Every tensor of a file: its description in the header, and the position of its data.

    Stored and processed as columns in the order of the names (that of the header): a Python statement per
    tensor would cost more than everything else about a header. Raises :class:`InvalidTensor`.
    """

    def __init__(self, names: Sequence[str], pairs: Sequence[Description]) -> None:
        self.names = names
        self._pairs = pairs
        # Thousands of tensors share a few (dtype, shape) pairs: what depends on the pair is computed once.
        sizes = {pair: _size(*pair) for pair in {*self._pairs}}
        if -1 in sizes.values():
            rows = zip(names, self._pairs, strict=True)
            raise InvalidTensor(*next((name, pair[1]) for name, pair in rows if sizes[pair] < 0))
        self._sizes = [*map(sizes.__getitem__, self._pairs)]
        # By descending item size, so that each tensor is aligned to its items without padding between them.
        descending = [-ITEM_SIZES[dtype] for dtype, _ in self._pairs]
        # The index in ``names`` of each tensor, in the order of the data. The sort is stable: then by name.
        self.order = sorted(range(len(names)), key=descending.__getitem__)
        # Where each tensor begins in the data, in that order, and where the last one ends.
        self.edges = [*accumulate([self._sizes[index] for index in self.order], initial=0)]
        self.data_bytes = self.edges[-1]
        self._begins = self._by_name(self.edges[:-1])

    def tensors(self, data_offset: int, digests: Sequence[str]) -> tuple[TensorInfo, ...]:
        """Return the tensors in the order of the data, that of ``digests``, with offsets in the file."""
        dtypes, shapes = zip(*self._pairs, strict=True) if self._pairs else ((), ())
        offsets = map(data_offset.__add__, self._begins)
        columns = (self.names, dtypes, shapes, offsets, self._sizes, self._by_name(digests))
        rows = [*map(TensorInfo._make, zip(*columns, strict=True))]
        return tuple([rows[index] for index in self.order])

    def byte_ranges(self) -> Iterator[tuple[int, int]]:
        """Yield where each tensor begins and ends in the data, in the order of the names."""
        return zip(self._begins, map(add, self._begins, self._sizes), strict=True)

    def encode(self) -> str:
        """Return the tensors' part of the header: for each, a comma and a member of the JSON object."""
        suffixes = self._format_pairs('],"dtype":"{}","shape":[{}]}}')
        ends = map(add, self._begins, self._sizes)
        columns = (self._encoded_names, self._begins, ends, suffixes)
        return "".join(map(',%s:{"data_offsets":[%d,%d%s'.__mod__, zip(*columns, strict=True)))

    def state_digest(self, state: str, digests: Sequence[str]) -> str:
        """Return the digest of a state, given as canonical JSON and the digests in the order of the data."""
        # By name, not in the order of the data: the identity must not depend on the layout.
        columns = (self._encoded_names, self._format_pairs('"{}",[{}]'), self._by_name(digests))
        tensors = ",".join(map('[%s,%s,"%s"]'.__mod__, zip(*columns, strict=True)))
        return blake3(f'{{"state":{encode_text(state)},"tensors":[{tensors}]}}'.encode()).hexdigest()

    @lockfree_cached_property
    def _encoded_names(self) -> list[str]:
        return [*map(encode_text, self.names)]

    def _by_name(self, values: Sequence[_Value]) -> list[_Value]:
        """Reorder values from the order of the data to that of the names."""
        reordered = [*values]
        for index, value in zip(self.order, values, strict=True):
            reordered[index] = value
        return reordered

    def _format_pairs(self, template: str) -> Iterator[str]:
        """Yield the template with each tensor's dtype and dimensions."""
        texts = {pair: template.format(pair[0], ",".join(map(str, pair[1]))) for pair in {*self._pairs}}
        return map(texts.__getitem__, self._pairs)


class InvalidTensor(Exception):
    """A tensor without a computable length. Its arguments: name and shape."""


class HeaderText:
    """An encoded header without its digests. Digests have a fixed length, so the header's length is known."""

    def __init__(self, table: TensorTable, *, step: int, kind: Kind, state: str, run: str) -> None:
        self._between_digests = (
            f'","format":"{FORMAT}","kind":"{kind}","run":{encode_text(run)},"state":{encode_text(state)},'
            '"state_digest":"'
        ).encode()
        self._suffix = f'","step":"{step}","version":"{VERSION}"}}{table.encode()}}}'.encode()
        encoded = sum(map(len, (OPENING, _DIGESTS, self._between_digests, self._suffix)))
        # One digest for each tensor, the state's and the header's own.
        self._end = LENGTH_BYTES + encoded + DIGEST_CHARACTERS * (2 + len(table.names))
        self.nbytes = -(-self._end // ALIGNMENT) * ALIGNMENT  # with the padding: the data begins here

    def complete(self, digests: Iterable[str], state_digest: str) -> tuple[bytes, str]:
        """Return the header's bytes and the ``digest`` in them; ``digests`` in the order of the data."""
        parts = [
            (self.nbytes - LENGTH_BYTES).to_bytes(LENGTH_BYTES, "little") + OPENING,
            NO_DIGEST.encode(),
            _DIGESTS,
            "".join(digests).encode(),
            self._between_digests,
            state_digest.encode(),
            self._suffix,
            b" " * (self.nbytes - self._end),
        ]
        hasher = blake3()
        for part in parts:
            hasher.update(part)
        digest = hasher.hexdigest()
        parts[1] = digest.encode()  # a digest cannot cover itself: it was hashed as zeros
        return b"".join(parts), digest


class Layout:
    """The position of every byte in a new file; known before any tensor is read.

    The caller waits while a layout is created, so the header is encoded only when first needed.
    Raises UnsupportedState for a shape, or a size of the header, that readers reject.
    """

    def __init__(
        self, tensors: Mapping[str, Description], *, step: int, kind: Kind, sections: dict[str, Any], run: str
    ) -> None:
        names = sorted(tensors)
        try:
            self._table = TensorTable(names, [*map(tensors.__getitem__, names)])
        except InvalidTensor as error:
            name, shape = error.args
            raise UnsupportedState(f"{name}: no reader accepts the shape {shape}", label=name) from None
        self.names = [names[index] for index in self._table.order]  # from here on, in the order of the data
        self.edges = self._table.edges
        self.data_bytes = self._table.data_bytes
        self.step, self._kind, self._sections, self._run = step, kind, sections, run

    @property
    def data_offset(self) -> int:
        """Where the data begins, in bytes: a multiple of :data:`ALIGNMENT`."""
        return self._text.nbytes

    @property
    def file_size(self) -> int:
        """Size of the whole file, in bytes."""
        return self.data_offset + self.data_bytes

    def header(self, digests: Sequence[str]) -> tuple[bytes, str]:
        """As :meth:`HeaderText.complete`."""
        return self._text.complete(digests, self._table.state_digest(self._state, digests))

    @lockfree_cached_property
    def _state(self) -> str:
        return canonical_json({"sections": self._sections, "step": self.step})

    @lockfree_cached_property
    def _text(self) -> HeaderText:
        text = HeaderText(self._table, step=self.step, kind=self._kind, state=self._state, run=self._run)
        if text.nbytes > MAX_HEADER_BYTES:
            raise UnsupportedState(
                f"the header would have {text.nbytes:,} bytes, and readers accept at most "
                f"{MAX_HEADER_BYTES:,}: store values that grow with the run as arrays",
                label="state",
            )
        return text


def header_digest(header: bytes | bytearray) -> str:
    """Return the digest of a header, from its length to its padding, with its own digest as zeros."""
    view = memoryview(header)
    hasher = blake3(view[: DIGEST_SLICE.start])
    hasher.update(NO_DIGEST.encode())
    return hasher.update(view[DIGEST_SLICE.stop :]).hexdigest()


#: In a forked child hashing is always single-threaded: the threads of the parent's pool do not exist there.
_in_forked_child = threading.Event()
os.register_at_fork(after_in_child=_in_forked_child.set)


def tensor_hasher(*, all_cores: bool) -> blake3:
    """Return a BLAKE3 hasher for a tensor's bytes: multi-threaded for large pieces, else single-threaded."""
    return blake3(max_threads=blake3.AUTO if all_cores and not _in_forked_child.is_set() else 1)


#: JSON with sorted keys and no spaces: equal values give equal text. Keeps NaN and infinities.
canonical_json = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode
#: JSON without spaces, the keys in their own order.
compact_json = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode


def is_valid_shape(shape: tuple[int, ...]) -> bool:
    """Return whether some tensor can have that shape. Nothing about it is trusted."""
    return _size("U8", shape) >= 0


def _size(dtype: str, shape: tuple[int, ...]) -> int:
    """Return a tensor's length in bytes, or -1 if it is impossible. Neither dtype nor shape is trusted."""
    item_size = ITEM_SIZES.get(dtype)
    # type(), not isinstance(): True is an int, and must not be a dimension of 1.
    if item_size is None or len(shape) > MAX_DIMENSIONS or {*map(type, shape)} - {int}:
        return -1
    # Without the zeros: frameworks reject a shape such as (0, 2**62, 2**62), too.
    if min(shape, default=0) < 0 or prod(filter(None, shape)) * item_size >= MAX_SIZE:
        return -1
    return prod(shape) * item_size
