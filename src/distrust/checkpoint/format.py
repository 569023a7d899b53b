"""What a checkpoint's file looks like, and the layout of a new one. No policy, and no I/O of its own.

A checkpoint is a safetensors file: 8 bytes of little-endian header length, a JSON header padded with spaces
so that the data begins on a multiple of 4096, then the tensors without gaps, by falling item size and then
by name. Three digests, all BLAKE3, let each part prove itself:

- ``digests``: one for each tensor's bytes;
- ``state_digest``: over each tensor's name, dtype, shape and digest, and over ``state`` (the skeleton and
  scalars): the identity of the state, the same for two bit-identical runs;
- ``digest``: over the header itself, with its own 64 characters set to "0".

They find accidents. They are no signature: whoever forges a file can compute them too.

The header is canonical: keys sorted, no spaces but the padding, UTF-8. ``__metadata__`` sorts before every
tensor and ``digest`` before its other keys, so every header of every version begins with :data:`OPENING`, and
the place of its own digest needs no search. There is one encoder, :class:`HeaderText`: a reader proves that
a header is canonical by encoding what it parsed (:mod:`distrust.checkpoint.header`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from json.encoder import encode_basestring as encode_text
from math import prod
from operator import add, itemgetter
from typing import Any, Literal, NamedTuple, TypeVar

from blake3 import blake3

from distrust.checkpoint.lazy import lockfree_cached_property
from distrust.errors import UnsupportedState

FORMAT = "distrust"
VERSION = 1
ALIGNMENT = 4096
LENGTH_BYTES = 8
#: The bound that other readers of the format set, too.
MAX_HEADER_BYTES = 100_000_000
#: What the frameworks allow. It also bounds the product of a hostile shape.
MAX_DIMENSIONS = 64
#: Sizes and offsets are less: they are signed 64-bit numbers wherever they are used.
MAX_SIZE = 2**63
DIGEST_CHARACTERS = 64
NO_DIGEST = "0" * DIGEST_CHARACTERS

METADATA = "__metadata__"
#: What every header begins with, after its length; then comes its own digest.
OPENING = f'{{"{METADATA}":{{"digest":"'.encode()
#: Where a header's own digest stands in the file.
DIGEST_SLICE = slice(LENGTH_BYTES + len(OPENING), LENGTH_BYTES + len(OPENING) + DIGEST_CHARACTERS)
_DIGESTS = b'","digests":"'

Kind = Literal["periodic", "final"]
_Value = TypeVar("_Value")

#: Every dtype of the format that has whole bytes, and its item size in bytes.
ITEM_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


class TensorInfo(NamedTuple):
    """A tensor as the header describes it.

    Attributes:
        name: its label.
        dtype: a key of :data:`ITEM_SIZES`.
        shape: its dimensions.
        offset: of its first byte, from the beginning of the file.
        nbytes: its length.
        digest: BLAKE3 of its bytes, in hexadecimal.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int = 0
    nbytes: int = 0
    digest: str = NO_DIGEST


class TensorTable:
    """Every tensor of a file: what the header says of it, and where its data goes.

    It is kept in columns, each in the order of the names (which is that of the header), and worked on a
    column at a time: a step of Python for each tensor would cost more than all the rest of a header.

    Args:
        names: in ascending order.
        dtypes: of each.
        shapes: of each.

    Attributes:
        order: the place in ``names`` of each tensor, in the order of the data.
        edges: where each begins in the data, in that order, and where the last one ends.
        data_bytes: the length of all the data.

    Raises:
        ImpossibleTensor: for a dtype that is not known or a shape that no reader takes.
    """

    def __init__(
        self, names: Sequence[str], dtypes: Iterable[str], shapes: Iterable[tuple[int, ...]]
    ) -> None:
        self.names = names
        # Thousands of tensors have a handful of kinds: what depends on the kind alone is made once for each.
        self._kinds = [*zip(dtypes, shapes, strict=True)]
        sizes = {kind: _size(*kind) for kind in {*self._kinds}}
        if -1 in sizes.values():
            named = zip(names, self._kinds, strict=True)
            raise ImpossibleTensor(*next((name, kind[1]) for name, kind in named if sizes[kind] < 0))
        self._sizes = [*map(sizes.__getitem__, self._kinds)]
        falling = [-ITEM_SIZES[dtype] for dtype, _ in self._kinds]
        self.order = sorted(range(len(names)), key=falling.__getitem__)  # stable: then by name
        self.edges = [*accumulate([self._sizes[place] for place in self.order], initial=0)]
        self.data_bytes = self.edges[-1]
        self._begins = self._by_name(self.edges[:-1])

    def tensors(self, data_offset: int, digests: Sequence[str]) -> tuple[TensorInfo, ...]:
        """The tensors in the order of their data.

        Args:
            data_offset: where the data begins in the file.
            digests: of each tensor, in that order.
        """
        dtypes, shapes = zip(*self._kinds, strict=True) if self._kinds else ((), ())
        offsets = map(data_offset.__add__, self._begins)
        columns = (self.names, dtypes, shapes, offsets, self._sizes, self._by_name(digests))
        rows = [*map(TensorInfo._make, zip(*columns, strict=True))]
        return tuple([rows[place] for place in self.order])

    def spans(self) -> Iterator[tuple[int, int]]:
        """Where each begins and ends in the data, in the order of the names."""
        return zip(self._begins, map(add, self._begins, self._sizes), strict=True)

    def encode(self) -> str:
        """The tensors' part of the header: a member of the object for each, after a comma."""
        rest = self._for_each_kind('],"dtype":"{}","shape":[{}]}}')
        ends = map(add, self._begins, self._sizes)
        columns = (self._encoded_names, self._begins, ends, rest)
        return "".join(map(',%s:{"data_offsets":[%d,%d%s'.__mod__, zip(*columns, strict=True)))

    def state_digest(self, state: str, digests: Sequence[str]) -> str:
        """The identity of a state: over ``state``, and each tensor's name, dtype, shape and digest.

        Args:
            state: canonical JSON.
            digests: of each tensor, in the order of the data.
        """
        rest = self._for_each_kind('"{}",[{}]')
        columns = (self._encoded_names, rest, self._by_name(digests))
        described = ",".join(map('[%s,%s,"%s"]'.__mod__, zip(*columns, strict=True)))
        return blake3(f'{{"state":{encode_text(state)},"tensors":[{described}]}}'.encode()).hexdigest()

    @lockfree_cached_property
    def _encoded_names(self) -> list[str]:
        return [*map(encode_text, self.names)]

    def _by_name(self, values: Sequence[_Value]) -> list[_Value]:
        """What comes in the order of the data, in that of the names."""
        sorted_ = [*values]
        for place, value in zip(self.order, values, strict=True):
            sorted_[place] = value
        return sorted_

    def _for_each_kind(self, template: str) -> Iterator[str]:
        """The template with each tensor's dtype and dimensions."""
        texts = {kind: template.format(kind[0], ",".join(map(str, kind[1]))) for kind in {*self._kinds}}
        return map(texts.__getitem__, self._kinds)


class ImpossibleTensor(Exception):
    """A tensor whose length nobody can tell. Its arguments: name and shape."""


class HeaderText:
    """A header, encoded but for its digests: they have a fixed length, so the header's own is known.

    Args:
        step: optimizer steps made.
        kind: of the checkpoint.
        state: canonical JSON.
        run: JSON.
        table: the tensors.

    Attributes:
        nbytes: of the header, with its length and its padding: where the data begins.
    """

    def __init__(self, *, step: int, kind: Kind, state: str, run: str, table: TensorTable) -> None:
        self._between = (
            f'","format":"{FORMAT}","kind":"{kind}","run":{encode_text(run)},"state":{encode_text(state)},'
            '"state_digest":"'
        ).encode()
        self._after = f'","step":"{step}","version":"{VERSION}"}}{table.encode()}}}'.encode()
        encoded = sum(map(len, (OPENING, _DIGESTS, self._between, self._after)))
        self._end = LENGTH_BYTES + encoded + DIGEST_CHARACTERS * (2 + len(table.names))
        self.nbytes = -(-self._end // ALIGNMENT) * ALIGNMENT

    def complete(self, digests: Iterable[str], state_digest: str) -> tuple[bytes, str]:
        """The bytes before the data, and the ``digest`` in them.

        Args:
            digests: of each tensor, in the order of the data.
            state_digest: the identity of the state.
        """
        parts = [
            (self.nbytes - LENGTH_BYTES).to_bytes(LENGTH_BYTES, "little") + OPENING,
            NO_DIGEST.encode(),
            _DIGESTS,
            "".join(digests).encode(),
            self._between,
            state_digest.encode(),
            self._after,
            b" " * (self.nbytes - self._end),
        ]
        hasher = blake3()
        for part in parts:
            hasher.update(part)
        digest = hasher.hexdigest()
        parts[1] = digest.encode()
        return b"".join(parts), digest


class Layout:
    """Where every byte of a new checkpoint goes; known before any tensor is read.

    Making one is cheap, for a caller waits for it: the header is encoded when it, or a place in the file, is
    first asked for; and only once.

    Attributes:
        names: of the tensors, in the order of their data.
        edges: where each begins in the data, in that order, and where the last one ends.
        data_bytes: the length of all the data.

    Raises:
        UnsupportedState: if no reader would take the shape of a tensor.
    """

    def __init__(
        self, tensors: Iterable[TensorInfo], *, step: int, kind: Kind, sections: dict[str, Any], run: str
    ) -> None:
        by_name = sorted(tensors, key=itemgetter(0))
        names, dtypes, shapes, *_ = zip(*by_name, strict=True) if by_name else ((), (), ())
        try:
            self._table = TensorTable(names, dtypes, shapes)
        except ImpossibleTensor as error:
            name, shape = error.args
            raise UnsupportedState(f"{name}: no reader takes the shape {shape}", label=name) from None
        self.names = [names[place] for place in self._table.order]
        self.edges = self._table.edges
        self.data_bytes = self._table.data_bytes
        self._step, self._kind, self._sections, self._run = step, kind, sections, run

    @property
    def data_offset(self) -> int:
        """Where the data begins, in bytes: a multiple of the alignment.

        Raises:
            UnsupportedState: if no reader would take the header.
        """
        return self._text.nbytes

    @property
    def file_size(self) -> int:
        """In bytes.

        Raises:
            UnsupportedState: if no reader would take the header.
        """
        return self.data_offset + self.data_bytes

    @lockfree_cached_property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """In the order of their data, with offsets, without digests.

        Raises:
            UnsupportedState: if no reader would take the header.
        """
        return self._table.tensors(self._text.nbytes, [NO_DIGEST] * len(self.names))

    def header(self, digests: Sequence[str]) -> tuple[bytes, str]:
        """The bytes before the data, and the ``digest`` in them, once each tensor's digest is known.

        Args:
            digests: of each tensor, in the order of the data.

        Raises:
            UnsupportedState: if no reader would take the header.
        """
        return self._text.complete(digests, self._table.state_digest(self._state, digests))

    @lockfree_cached_property
    def _state(self) -> str:
        return canonical_json({"sections": self._sections, "step": self._step})

    @lockfree_cached_property
    def _text(self) -> HeaderText:
        text = HeaderText(
            step=self._step, kind=self._kind, state=self._state, run=self._run, table=self._table
        )
        if text.nbytes > MAX_HEADER_BYTES:
            raise UnsupportedState(
                f"the header would have {text.nbytes:,} bytes, and no reader takes more than "
                f"{MAX_HEADER_BYTES:,}: what grows belongs in arrays",
                label="state",
            )
        return text


def header_digest(header: bytes | bytearray) -> str:
    """The digest of a header, from its length to its padding, with the place of its own digest blank."""
    view = memoryview(header)
    hasher = blake3(view[: DIGEST_SLICE.start])
    hasher.update(NO_DIGEST.encode())
    return hasher.update(view[DIGEST_SLICE.stop :]).hexdigest()


def tensor_hasher(*, all_cores: bool) -> blake3:
    """A digest for large pieces that uses every core, or one for small ones, which threads would only delay.

    In a forked child always the latter: its parent's threads would never answer.
    """
    return blake3(max_threads=blake3.AUTO if all_cores and not _forked else 1)


def _remember_fork() -> None:
    global _forked
    _forked = True


_forked = False
os.register_at_fork(after_in_child=_remember_fork)


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False)
_COMPACT = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text. NaN and infinities are kept."""
    return _CANONICAL.encode(value)


def compact_json(value: Any) -> str:
    """The same with keys in the order in which they stand."""
    return _COMPACT.encode(value)


def is_valid_shape(shape: tuple[int, ...]) -> bool:
    """Whether a tensor of the smallest items can have that shape. Nothing about it is trusted."""
    return _size("U8", shape) >= 0


def _size(dtype: str, shape: tuple[int, ...]) -> int:
    """The bytes of a tensor, or -1 if there is no such tensor. Nothing about dtype and shape is trusted."""
    item_size = ITEM_SIZES.get(dtype)
    # bool is an int to isinstance, and True a dimension of 1: type() is meant.
    if (
        item_size is None
        or len(shape) > MAX_DIMENSIONS
        or {*map(type, shape)} - {int}
        or min(shape, default=0) < 0
    ):
        return -1
    # A dimension of 0 leaves the others as they are: frameworks refuse their product if it is too large.
    if prod(filter(None, shape)) * item_size >= MAX_SIZE:
        return -1
    return prod(shape) * item_size
