"""Header, layout and digests: bytes <-> meaning. No policy, and no I/O of its own.

A checkpoint is a safetensors file: 8 bytes of little-endian header length, a JSON header padded with spaces
so that the data begins on a multiple of 4096, then the tensors without gaps, by falling item size and then
by name. Three digests, all BLAKE3, let each part prove itself:

- ``digests``: one for each tensor's bytes;
- ``state_digest``: over each tensor's name, dtype, shape and digest, and over ``state`` (the skeleton and
  scalars): the identity of the state, the same for two bit-identical runs;
- ``digest``: over the header itself, with its own 64 characters set to "0".

They find accidents. They are no signature: whoever forges a file can compute them too.

The header is canonical (keys sorted, no spaces but the padding, UTF-8), so "with its own value set to zero"
needs no search: a reader encodes what it parsed, compares the bytes, and encodes once more with zeros.
A reader trusts nothing that a file says of itself: see :func:`parse_header`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any, Literal, cast, get_args

from blake3 import blake3

from distrust.checkpoint import tree
from distrust.checkpoint.checkpoint import ARRAY_SECTIONS, STATE_SECTIONS
from distrust.errors import CorruptCheckpoint, UnsupportedState, UnsupportedVersion

FORMAT = "distrust"
VERSION = 1
METADATA_KEYS = {
    "format", "version", "step", "kind", "state", "run", "digests", "state_digest", "digest"
}  # fmt: skip
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

Kind = Literal["periodic", "final"]

#: Every dtype of the format that has whole bytes, and its item size in bytes.
ITEM_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
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


@dataclass(frozen=True)
class Header:
    """What the first bytes of a checkpoint say, after all of it was checked but the tensors' bytes.

    Attributes:
        step: optimizer steps made.
        kind: ``periodic``, or ``final`` for one that is never cleaned up.
        state: canonical JSON of the skeleton, the scalars, the config and the metadata.
        run: JSON of what may differ between equal runs.
        tensors: in the order of their data.
        state_digest: the identity of the state.
        digest: of the header.
        file_size: in bytes.
    """

    step: int
    kind: Kind
    state: str
    run: str
    tensors: tuple[TensorInfo, ...]
    state_digest: str
    digest: str
    file_size: int

    @cached_property
    def sections(self) -> dict[str, Any]:
        """The skeleton of each section of the state; together they name every tensor once.

        Raises:
            CorruptCheckpoint: if ``state`` is not what a writer makes.
        """
        state = _load_json(self.state, "state")
        sections = state.get("sections") if type(state) is dict else None
        if type(sections) is not dict or state.get("step") != self.step:
            raise CorruptCheckpoint("the state is not that of the step in the header")
        named: list[str] = []
        for name in STATE_SECTIONS:
            labels: list[str] = []
            if type(tree.unflatten(sections.get(name), labels.append)) is not dict:
                raise CorruptCheckpoint(f"the state has no {name}")
            if labels and name not in ARRAY_SECTIONS:
                raise CorruptCheckpoint(f"{name} names a tensor, {labels[0]}")
            named += labels
        if sorted(named) != sorted(tensor.name for tensor in self.tensors):
            raise CorruptCheckpoint("the state does not name every tensor of the file once")
        return sections

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """The caller's metadata."""
        return self._plain("metadata")

    @cached_property
    def config(self) -> dict[str, Any]:
        """The options that change the result."""
        return self._plain("config")

    @cached_property
    def run_info(self) -> dict[str, Any]:
        """What may differ between equal runs: created, host, metrics and the caller's own.

        Raises:
            CorruptCheckpoint: if ``run`` is not what a writer makes.
        """
        run = _load_json(self.run, "run")
        if type(run) is not dict or any(type(run.get(part)) is not dict for part in ("metrics", "extra")):
            raise CorruptCheckpoint("the header's run is not what a writer makes")
        return run

    @cached_property
    def metrics(self) -> dict[str, float]:
        """The numbers of the metadata, and those saved as metrics."""
        candidates = {**self.metadata, **self.saved_metrics}
        return {
            name: value
            for name, value in candidates.items()
            if isinstance(name, str) and isinstance(value, (int, float)) and not isinstance(value, bool)
        }

    @cached_property
    def saved_metrics(self) -> dict[str, float]:
        """What was saved as metrics, without the numbers of the metadata."""
        saved: dict[str, float] = self.run_info["metrics"]
        return saved

    def _plain(self, section: str) -> dict[str, Any]:
        plain: dict[str, Any] = tree.unflatten(self.sections[section], str)  # there are no arrays in it
        return plain


class Layout:
    """Where every byte of a new checkpoint goes; known before any tensor is read.

    Attributes:
        tensors: in the order of their data, with offsets, without digests.
        data_offset: where the data begins.
        file_size: in bytes.

    Raises:
        UnsupportedState: if no reader would take the header, or the shape of a tensor.
    """

    def __init__(
        self, tensors: Sequence[TensorInfo], *, step: int, kind: Kind, sections: dict[str, Any], run: str
    ) -> None:
        for tensor in tensors:
            if not _has_room(tensor.dtype, tensor.shape):
                raise UnsupportedState(
                    f"{tensor.name}: no reader takes the shape {tensor.shape}", label=tensor.name
                )
        ordered = sorted(tensors, key=lambda tensor: (-ITEM_SIZES[tensor.dtype], tensor.name))
        sized = [replace(tensor, nbytes=_nbytes(tensor.dtype, tensor.shape)) for tensor in ordered]
        state = canonical_json({"sections": sections, "step": step})
        blank = Header(step, kind, state, run, tuple(sized), NO_DIGEST, NO_DIGEST, 0)
        # Digests have a fixed length, so the header's own length is known before they are.
        self._header_bytes = _padded(len(_encode(blank)))
        if LENGTH_BYTES + self._header_bytes > MAX_HEADER_BYTES:
            raise UnsupportedState(
                f"the header would have {self._header_bytes:,} bytes, and no reader takes more than "
                f"{MAX_HEADER_BYTES:,}: what grows belongs in arrays",
                label="state",
            )
        position = LENGTH_BYTES + self._header_bytes
        placed = []
        for tensor in sized:
            placed.append(replace(tensor, offset=position))
            position += tensor.nbytes
        self.tensors = tuple(placed)
        self.data_offset = LENGTH_BYTES + self._header_bytes
        self.file_size = position
        self._blank = replace(blank, tensors=self.tensors, file_size=position)

    def header(self, digests: Sequence[str]) -> tuple[bytes, str]:
        """The bytes before the data, and the ``digest`` in them, once each tensor's digest is known."""
        tensors = tuple(
            replace(tensor, digest=digest) for tensor, digest in zip(self.tensors, digests, strict=True)
        )
        blank = replace(self._blank, tensors=tensors, state_digest=state_digest(tensors, self._blank.state))
        digest = blake3(self._framed(blank)).hexdigest()
        return self._framed(replace(blank, digest=digest)), digest

    def _framed(self, header: Header) -> bytes:
        return _frame(_encode(header), self._header_bytes)


def header_length(first: bytes, file_size: int) -> int:
    """The length of the header and the 8 bytes before it.

    Args:
        first: the first 8 bytes of the file.
        file_size: of the whole file, in bytes.

    Raises:
        CorruptCheckpoint: if no header of that length can be there.
    """
    if len(first) < LENGTH_BYTES:
        raise CorruptCheckpoint(f"{file_size} bytes are too few for a checkpoint")
    length = LENGTH_BYTES + int.from_bytes(first, "little")
    if length > min(file_size, MAX_HEADER_BYTES):
        raise CorruptCheckpoint(
            f"no checkpoint, or cut or overwritten: a header of {length} bytes, a file of {file_size}"
        )
    return length


def parse_header(raw: bytes, file_size: int) -> Header:
    """Read and check a header, from its 8 bytes of length to its padding.

    Checked: UTF-8, JSON without duplicate keys, the version, every field's type, tensors that fill the data
    exactly and in order, canonical encoding, the digests of header and state. Not the tensors' bytes.

    Raises:
        CorruptCheckpoint: with what is wrong.
        UnsupportedVersion: if a later version of the format wrote the file.
    """
    body = raw[LENGTH_BYTES:]
    try:
        text = body.decode()
    except UnicodeDecodeError:
        raise CorruptCheckpoint("the header is not UTF-8") from None
    fields = _load_json(text, "header")
    metadata = _metadata(fields)
    _require_own_digest(fields, raw)
    # Only now: a flipped bit in the version is damage, not a later version.
    _require_version(metadata)
    header = Header(
        step=_integer(metadata["step"], "step"),
        kind=_kind(metadata["kind"]),
        state=metadata["state"],
        run=metadata["run"],
        tensors=_tensors(fields, metadata["digests"], len(raw), file_size),
        state_digest=metadata["state_digest"],
        digest=metadata["digest"],
        file_size=file_size,
    )
    if header.state_digest != state_digest(header.tensors, header.state):
        raise CorruptCheckpoint("the state's digest does not match the state")
    return header


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


def state_digest(tensors: Sequence[TensorInfo], state: str) -> str:
    """The identity of a state: BLAKE3 over its tensors' names, dtypes, shapes and digests, and ``state``."""
    described = sorted([tensor.name, tensor.dtype, list(tensor.shape), tensor.digest] for tensor in tensors)
    return blake3(canonical_json({"state": state, "tensors": described}).encode()).hexdigest()


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text. NaN and infinities are kept."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _nbytes(dtype: str, shape: Sequence[int]) -> int:
    return prod(shape) * ITEM_SIZES[dtype]


def _has_room(dtype: str, shape: Sequence[int]) -> bool:
    # A dimension of 0 leaves the others as they are: frameworks refuse their product if it is too large.
    return len(shape) <= MAX_DIMENSIONS and _nbytes(dtype, [size for size in shape if size]) < MAX_SIZE


def _padded(length: int) -> int:
    """The header's length with its padding: the data begins on a multiple of the alignment."""
    return -(-(LENGTH_BYTES + length) // ALIGNMENT) * ALIGNMENT - LENGTH_BYTES


def _frame(body: bytes, length: int) -> bytes:
    return length.to_bytes(LENGTH_BYTES, "little") + body.ljust(length)


def _encode(header: Header) -> bytes:
    position = 0
    fields: dict[str, Any] = {
        "__metadata__": {
            "format": FORMAT,
            "version": str(VERSION),
            "step": str(header.step),
            "kind": header.kind,
            "state": header.state,
            "run": header.run,
            "digests": "".join(tensor.digest for tensor in header.tensors),
            "state_digest": header.state_digest,
            "digest": header.digest,
        }
    }
    for tensor in header.tensors:
        end = position + tensor.nbytes
        fields[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    return canonical_json(fields).encode()


def _load_json(text: str, what: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"the {what} is not the JSON that a writer makes ({error})") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return fields


def _metadata(fields: Any) -> dict[str, Any]:
    metadata = fields.get("__metadata__") if type(fields) is dict else None
    if type(metadata) is not dict or metadata.get("format") != FORMAT:
        raise CorruptCheckpoint("not a checkpoint of this library: its metadata names no format 'distrust'")
    return metadata


def _require_own_digest(fields: dict[str, Any], raw: bytes) -> None:
    """Every version of the format keeps to this: canonical form, and the digest of it."""
    blank = {**fields, "__metadata__": {**fields["__metadata__"], "digest": NO_DIGEST}}
    length = len(raw) - LENGTH_BYTES
    try:
        canonical, blanked = (_frame(canonical_json(each).encode(), length) for each in (fields, blank))
    except (UnicodeEncodeError, RecursionError):
        raise CorruptCheckpoint("the header holds what no writer puts there") from None
    if canonical != raw:
        raise CorruptCheckpoint("the header is not in canonical form")
    if fields["__metadata__"].get("digest") != blake3(blanked).hexdigest():
        raise CorruptCheckpoint("the header's digest does not match the header")


def _require_version(metadata: dict[str, Any]) -> None:
    version = _integer(metadata.get("version"), "version")
    if version > VERSION:
        raise UnsupportedVersion(
            f"written in version {version} of the format, this program reads up to {VERSION}: upgrade it"
        )
    if version < VERSION:
        raise CorruptCheckpoint(f"there is no version {version} of the format")
    if metadata.keys() != METADATA_KEYS or not all(type(value) is str for value in metadata.values()):
        raise CorruptCheckpoint(f"the header's metadata is not {', '.join(sorted(METADATA_KEYS))}, all text")


def _integer(text: Any, name: str) -> int:
    # 18 digits: no text of an unbounded length is ever parsed as a number.
    digits = type(text) is str and text.isascii() and text.isdigit() and len(text) <= 18
    if not digits or text != str(int(text)):
        raise CorruptCheckpoint(f"the header's {name} is no whole number")
    return int(text)


def _kind(text: str) -> Kind:
    if text not in get_args(Kind):
        raise CorruptCheckpoint(f"the header's kind {text!r} is none of {', '.join(get_args(Kind))}")
    return cast(Kind, text)


def _tensors(
    fields: dict[str, Any], digests: str, data_offset: int, file_size: int
) -> tuple[TensorInfo, ...]:
    described = [_tensor(name, entry) for name, entry in fields.items() if name != "__metadata__"]
    described.sort(key=lambda tensor: (-ITEM_SIZES[tensor.dtype], tensor.name))
    if len(digests) != DIGEST_CHARACTERS * len(described):
        raise CorruptCheckpoint(f"there are not {len(described)} digests for {len(described)} tensors")
    placed = []
    position = 0
    for index, tensor in enumerate(described):
        if tensor.offset != position:
            raise CorruptCheckpoint(f"tensor {tensor.name} does not begin where the one before it ends")
        digest = digests[index * DIGEST_CHARACTERS : (index + 1) * DIGEST_CHARACTERS]
        placed.append(replace(tensor, offset=data_offset + position, digest=digest))
        position += tensor.nbytes
    if data_offset + position != file_size:
        raise CorruptCheckpoint(
            f"the file has {file_size} bytes, its header speaks of {data_offset + position}"
        )
    return tuple(placed)


def _is_no_size(value: Any) -> bool:
    # bool is an int to isinstance, and True a dimension of 1: type() is meant.
    return type(value) is not int or not 0 <= value < MAX_SIZE


def _tensor(name: str, entry: Any) -> TensorInfo:
    if type(entry) is not dict or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CorruptCheckpoint(f"tensor {name} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in ITEM_SIZES:
        raise CorruptCheckpoint(f"tensor {name} has the unknown dtype {dtype!r}")
    if type(shape) is not list or any(map(_is_no_size, shape)) or not _has_room(dtype, shape):
        raise CorruptCheckpoint(f"tensor {name} has no valid shape")
    if type(offsets) is not list or len(offsets) != 2 or any(map(_is_no_size, offsets)):
        raise CorruptCheckpoint(f"tensor {name} has no valid data_offsets")
    nbytes = _nbytes(dtype, shape)
    if offsets[1] - offsets[0] != nbytes:
        raise CorruptCheckpoint(f"tensor {name} has {offsets[1] - offsets[0]} bytes, not {nbytes}")
    return TensorInfo(name, dtype, tuple(shape), offsets[0], nbytes)
