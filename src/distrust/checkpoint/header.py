"""Parsing and checking a checkpoint's header. No I/O.

A reader trusts nothing in the file, and each caller pays only for what it uses: :func:`parse_header` checks
the digest and what a listing shows. The tensors and skeletons, which may be thousands of times as long, are
parsed and checked on first access. :meth:`Header.require_intact` checks everything, before any data is read.

So damage is detected at once, wherever it is. A forged file with correct digests is rejected where it is
used, always with :class:`CorruptCheckpoint`. Canonical form is checked by re-encoding what was parsed and
comparing the bytes. That rules out duplicate keys, gaps and overlaps between tensors, lengths that do not
match dtype and shape, and True for 1, so none of these has a check of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import chain
from operator import lt
from typing import Any, cast, get_args

from distrust.checkpoint import tree
from distrust.checkpoint.format import (
    ALIGNMENT,
    DIGEST_CHARACTERS,
    DIGEST_SLICE,
    FORMAT,
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    METADATA,
    OPENING,
    VERSION,
    Description,
    HeaderText,
    InvalidTensor,
    Kind,
    TensorInfo,
    TensorTable,
    canonical_json,
    compact_json,
    header_digest,
    is_valid_shape,
)
from distrust.checkpoint.lazy import lockfree_cached_property
from distrust.errors import CorruptCheckpoint, ErrorTranslator, UnsupportedVersion, shorten

METADATA_KEYS = (
    "digest", "digests", "format", "kind", "run", "state", "state_digest", "step", "version"
)  # fmt: skip
#: The state begins with these; the skeletons of model, optimizer and rng, long with many tensors, follow.
_FIRST_SECTIONS = ("config", "history", "metadata")
_STATE_KEYS = ("sections", "step")
_SECTIONS = (*sorted(tree.STATE_SECTIONS),)
_KINDS = get_args(Kind)
#: A tensor's member of the header. Possessive quantifiers ("++", "*+") never backtrack, so hostile text
#: cannot make the match slow.
_MEMBER = re.compile(
    r',"((?:[^"\\\x00-\x1f]++|\\.)*+)":\{"data_offsets":\[([0-9]++,[0-9]++)\],'
    r'"dtype":"([A-Z0-9_]++)","shape":\[([0-9,]*+)\]\}'
)
_MEMBER_FRAME = len(',"":{"data_offsets":[],"dtype":"","shape":[]}')
_DECODER = json.JSONDecoder()
_PAIRS_DECODER = json.JSONDecoder(object_pairs_hook=tuple)


class Header:
    """The contents of a header."""

    format = FORMAT
    lacks_arrays = False  # only a foreign checkpoint can be metadata only

    def __init__(self, metadata: dict[str, str], table: str, data_offset: int, file_size: int) -> None:
        self.step = _integer(metadata["step"], "step")
        if metadata["kind"] not in _KINDS:
            kind = shorten(metadata["kind"])
            raise CorruptCheckpoint(f"the header's kind {kind!r} is none of {', '.join(_KINDS)}")
        self.kind = cast(Kind, metadata["kind"])
        self.state = metadata["state"]  # canonical JSON: skeleton, scalars, config and metadata
        self.run = metadata["run"]  # JSON of what may differ between equal runs
        self.state_digest = metadata["state_digest"]  # the identity of the state
        self.digest = metadata["digest"]  # of the header
        self.file_size = file_size
        self._digests = metadata["digests"]  # of the tensors, concatenated
        self._table_text = table
        self._data_offset = data_offset
        self.config, self.metadata = _plain_sections(self.state, self.step)
        self.run_info = _run_info(self.run)
        self.saved_metrics: dict[str, float] = self.run_info["metrics"]  # without the numbers in the metadata
        self.measured_on: str = self.run_info.get("measured_on", "")

    @lockfree_cached_property
    def metrics(self) -> dict[str, float]:
        """The numbers in the metadata and the saved metrics; the latter take precedence."""
        candidates = {**self.metadata, **self.saved_metrics}
        return {
            name: value
            for name, value in candidates.items()
            if isinstance(name, str) and isinstance(value, (int, float)) and not isinstance(value, bool)
        }

    @lockfree_cached_property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """The tensors in the order of their data; CorruptCheckpoint if no writer lays them out like this."""
        return self._table.tensors(self._data_offset, self._tensor_digests)

    @lockfree_cached_property
    def sections(self) -> dict[str, Any]:
        """The skeleton of each section; CorruptCheckpoint unless together they name every tensor once."""
        state = _parse_canonical("state", self.state, canonical_json)
        sections = state.get("sections") if type(state) is dict else None
        if type(sections) is not dict or state.get("step") != self.step:
            raise CorruptCheckpoint("the state is not of the step in the header")
        if (*state,) != _STATE_KEYS or (*sections,) != _SECTIONS:
            raise CorruptCheckpoint(f"the state does not hold {', '.join(_SECTIONS)} and nothing else")
        all_labels: list[str] = []
        for name in tree.STATE_SECTIONS:
            labels: list[str] = []
            if type(tree.unflatten(sections.get(name), labels.append)) is not dict:
                raise CorruptCheckpoint(f"the state has no {name}")
            if labels and name not in tree.ARRAY_SECTIONS:
                raise CorruptCheckpoint(f"{name} names a tensor, {shorten(labels[0])!r}")
            all_labels += labels
        if sorted(all_labels) != self._table.names:  # a tensor used twice, unused, or missing
            raise CorruptCheckpoint("the state does not name every tensor of the file once")
        return sections

    def require_intact(self) -> None:
        """Check everything that can be checked without the tensors' bytes; raise CorruptCheckpoint."""
        _ = self.sections  # parses and checks them
        with _json_errors("header"):  # lone surrogates cannot be encoded
            state_digest = self._table.state_digest(self.state, self._tensor_digests)
            text = HeaderText(self._table, step=self.step, kind=self.kind, state=self.state, run=self.run)
            _, digest = text.complete(self._tensor_digests, self.state_digest)
        if self.state_digest != state_digest:
            raise CorruptCheckpoint("the state's digest does not match the state")
        # parse_header verified that self.digest is that of the file's bytes: if the digest of the re-encoded
        # header is equal, so are the bytes.
        if self.digest != digest:
            raise CorruptCheckpoint("the header is not in canonical form")

    @lockfree_cached_property
    def _table(self) -> TensorTable:
        names, byte_ranges, pairs = _parse_table(self._table_text)
        try:
            table = TensorTable(names, pairs)
        except InvalidTensor as error:
            name = shorten(error.args[0])
            raise CorruptCheckpoint(f"tensor {name!r} has an unknown dtype or an invalid shape") from None
        if not all(map(lt, [METADATA, *names], names)):  # strictly ascending: no duplicate keys
            raise CorruptCheckpoint("the tensors are not sorted by name, or a name occurs twice")
        # Offsets are never used: they must equal those that a writer computes from dtypes and shapes.
        expected = [*map("%d,%d".__mod__, table.byte_ranges())]
        if byte_ranges != expected:
            rows = zip(names, byte_ranges, expected, strict=True)
            name, correct = next((name, right) for name, actual, right in rows if actual != right)
            raise CorruptCheckpoint(f"tensor {shorten(name)!r} is not at the bytes {correct} of the data")
        if len(self._digests) != DIGEST_CHARACTERS * len(names):
            raise CorruptCheckpoint(f"there are not {len(names)} digests for {len(names)} tensors")
        return table

    @property
    def _tensor_digests(self) -> list[str]:
        starts = range(0, len(self._digests), DIGEST_CHARACTERS)
        return [self._digests[start : start + DIGEST_CHARACTERS] for start in starts]


def header_length(first: bytes, file_size: int) -> int:
    """Return the length of the header with the 8 bytes before it, given at least the first 8 of the file.

    Raises CorruptCheckpoint if a file of that size cannot have such a header.
    """
    if len(first) < LENGTH_BYTES:
        raise CorruptCheckpoint(f"{file_size} bytes are too few for a checkpoint")
    length = LENGTH_BYTES + int.from_bytes(first[:LENGTH_BYTES], "little")
    if length > min(file_size, MAX_HEADER_BYTES):  # before any memory is allocated for it
        raise CorruptCheckpoint(
            f"not a checkpoint, or truncated or overwritten: {length} bytes of header, {file_size} of file"
        )
    return length


def parse_header(raw: bytes | bytearray, file_size: int) -> Header:
    """Parse and check a header, from its 8 bytes of length to its padding.

    Checks the digest of the header, the version, every field of the metadata, the scalars of the state and
    the size of the file. Raises CorruptCheckpoint, or UnsupportedVersion if a later version wrote the file.
    """
    if not raw.startswith(OPENING, LENGTH_BYTES):
        problem = f"its header does not begin like one of {FORMAT}"
        raise CorruptCheckpoint(f"not a checkpoint of this library: {problem}")
    # First, and the same in every version: everything below parses bytes that are as they were written.
    if raw[DIGEST_SLICE] != header_digest(raw).encode():
        raise CorruptCheckpoint("the header's digest does not match the header")
    try:
        text = str(memoryview(raw)[LENGTH_BYTES:], "utf-8")
    except UnicodeDecodeError:
        raise CorruptCheckpoint("the header is not UTF-8") from None
    metadata, end = _parse_metadata(text)
    # Exactly one padding is valid. Otherwise two files of the same state could differ.
    last = text.rfind("}")
    if text[last + 1 :] != " " * (len(text) - last - 1) or len(raw) % ALIGNMENT:
        raise CorruptCheckpoint("the header is not padded as a writer pads it")
    table = text[end:last]
    if not _fits_data(table, file_size - len(raw)):
        raise CorruptCheckpoint(f"the file has {file_size} bytes, and its header states another size")
    return Header(metadata, table, len(raw), file_size)


def _parse_metadata(text: str) -> tuple[dict[str, str], int]:
    """Return the metadata and the position of its end."""
    try:
        pairs, end = _PAIRS_DECODER.raw_decode(text, text.index("{", 1))
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"the header is not the JSON that a writer produces ({error})") from None
    metadata = dict(pairs)  # from pairs, to detect duplicate keys
    if metadata.get("format") != FORMAT or len(metadata) != len(pairs):
        raise CorruptCheckpoint(f"not a checkpoint of this library: its metadata names no format {FORMAT!r}")
    # Before the other keys, which a later version may change.
    version = _integer(metadata.get("version"), "version")
    if version > VERSION:
        raise UnsupportedVersion(
            f"written in version {version} of the format, this program reads up to {VERSION}: upgrade it"
        )
    if version < VERSION:
        raise CorruptCheckpoint(f"there is no version {version} of the format")
    if (*metadata,) != METADATA_KEYS or {*map(type, metadata.values())} != {str}:
        raise CorruptCheckpoint(f"the header's metadata is not {', '.join(METADATA_KEYS)}, all text")
    return metadata, end


def _fits_data(table: str, data_bytes: int) -> bool:
    """Return whether the tensors' data ends where the file ends, judged by the text of the table alone."""
    # In canonical form the data has no gaps: it ends where one tensor ends and no other begins, except empty
    # ones. No name can be mistaken for an offset: in a JSON string, a backslash precedes each quote.
    at_end = table.count(f'":{{"data_offsets":[{data_bytes},')
    empty = table.count(f'":{{"data_offsets":[{data_bytes},{data_bytes}],"dtype":')
    return at_end == empty and (data_bytes == 0 or f',{data_bytes}],"dtype":' in table)


def _plain_sections(state: str, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the config and the metadata, without parsing the skeletons that follow them."""
    nodes: dict[str, Any] = {}
    end = len('{"sections":')
    with _json_errors("state"):
        for name in _FIRST_SECTIONS:
            nodes[name], end = _DECODER.raw_decode(state, end + len(f',"{name}":'))
        _require_same(state[:end], '{"sections":' + canonical_json(nodes)[:-1])
    config, metadata = (tree.unflatten(nodes[name], _refuse_tensor) for name in ("config", "metadata"))
    if type(config) is not dict or type(metadata) is not dict:
        raise CorruptCheckpoint("the state has no config or no metadata")
    if not state.endswith(f',"step":{step}}}'):
        raise CorruptCheckpoint("the state is not of the step in the header")
    return config, metadata


def _refuse_tensor(label: str) -> None:
    raise CorruptCheckpoint(f"config or metadata names a tensor, {shorten(label)!r}")


def _run_info(text: str) -> dict[str, Any]:
    run: Any = _parse_canonical("run", text, compact_json)  # in the order of keys of the caller
    if type(run) is not dict or any(type(run.get(part)) is not dict for part in ("metrics", "extra")):
        raise CorruptCheckpoint("the header's run is not one that a writer produces")
    if type(run.get("measured_on", "")) is not str:
        raise CorruptCheckpoint("the header's measured_on is not text")
    if tree.is_too_deep(run):
        raise CorruptCheckpoint(f"the header's run is nested deeper than {tree.MAX_DEPTH} levels")
    return run


def _json_errors(part: str) -> ErrorTranslator:
    """Convert the errors of hostile JSON to :class:`CorruptCheckpoint`."""
    return ErrorTranslator(
        (ValueError, RecursionError),  # of deep nesting; UnicodeError is a ValueError
        lambda error: CorruptCheckpoint(f"the {part} is not the JSON that a writer produces ({error})"),
    )


def _parse_canonical(part: str, text: str, encode: Callable[[Any], str]) -> Any:
    with _json_errors(part):
        value = json.loads(text)
        _require_same(text, encode(value))
    return value


def _require_same(text: str, encoded: str) -> None:
    """Check that text is the canonical encoding of what was parsed from it."""
    if text != encoded:
        raise ValueError("not in canonical form")
    text.encode()  # raises for lone surrogates, which JSON can escape


def _parse_table(table: str) -> tuple[list[str], list[str], list[Description]]:
    """Return names, byte ranges ("begin,end") and descriptions of the tensors, in the order of the text."""
    # A regular expression, not a JSON parser: a writer produces one form, and any other is invalid.
    members = _MEMBER.findall(table)
    columns: list[Any] = [*zip(*members, strict=True)] or [()] * 4
    # Matches are in order and do not overlap: if their total length is that of the text, they are all of it.
    if sum(map(len, chain.from_iterable(columns))) + _MEMBER_FRAME * len(members) != len(table):
        raise CorruptCheckpoint("a tensor's description is not one that a writer produces")
    names, byte_ranges, dtypes, shapes = columns
    names = [_name(name) if "\\" in name else name for name in names]
    parsed = {shape: _shape(shape) for shape in {*shapes}}  # thousands of tensors share a few shapes
    return names, [*byte_ranges], [*zip(dtypes, map(parsed.__getitem__, shapes), strict=True)]


def _shape(text: str) -> tuple[int, ...]:
    shape = tuple(_parse_canonical("table of tensors", f"[{text}]", compact_json))
    # Before any shape is put into a set: whoever chooses the integers in it also chooses its hash.
    if not is_valid_shape(shape):
        raise CorruptCheckpoint(f"no tensor can have the shape [{shorten(text)}]")
    return shape


def _name(encoded: str) -> Any:
    return _parse_canonical("table of tensors", f'"{encoded}"', canonical_json)


def _integer(text: Any, name: str) -> int:
    # At most 18 digits: parsing an integer takes quadratic time.
    is_number = type(text) is str and text.isascii() and text.isdigit() and len(text) <= 18
    if not is_number or text != str(int(text)):  # no leading zeros
        raise CorruptCheckpoint(f"the header's {name} is not an integer")
    return int(text)
