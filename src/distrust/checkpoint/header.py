"""A checkpoint's header, read and checked. No I/O of its own.

A reader trusts nothing that a file says of itself, and pays only for what it asks:

- :func:`parse_header` proves that the header is the one that was written, by its digest; it parses and checks
  the metadata, every scalar of the state, and that the file has the size of which the header speaks. That is
  all a listing shows. The tensors' descriptions and the skeleton of their sections, which may be thousands
  of times as long, are covered by the digest and not parsed.
- :attr:`Header.tensors` and :attr:`Header.sections` parse and check those when first asked for.
- :meth:`Header.require_intact` checks everything: the two above, the state's digest, and canonical form.
  Whoever reads the data calls it before.

So damage is found at once, wherever it is. What is forged, with digests that are right, is found where it is
used, always as :class:`CorruptCheckpoint`. Canonical form is checked by encoding what was parsed as a writer
does, and comparing: that leaves no room for a key that stands twice, a gap or an overlap between tensors, a
length that is not that of dtype and shape, or True for 1, so there is no check of its own for each of them.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
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
    HeaderText,
    ImpossibleTensor,
    Kind,
    TensorInfo,
    TensorTable,
    canonical_json,
    compact_json,
    header_digest,
    is_valid_shape,
)
from distrust.checkpoint.lazy import lockfree_cached_property
from distrust.checkpoint.tree import ARRAY_SECTIONS, STATE_SECTIONS
from distrust.errors import CorruptCheckpoint, UnsupportedVersion, shorten

METADATA_KEYS = (
    "digest", "digests", "format", "kind", "run", "state", "state_digest", "step", "version"
)  # fmt: skip
#: How the state begins. The skeletons of model, optimizer and rng, as long as there are tensors, come behind.
_FIRST_SECTIONS = ("config", "history", "metadata")
_STATE_KEYS = ("sections", "step")
_SECTIONS = (*sorted(STATE_SECTIONS),)
_KINDS = get_args(Kind)
#: A tensor's member of the header. Nothing is ever tried twice ("+" after a repetition): hostile text costs
#: no more time than any other.
_MEMBER = re.compile(
    r',"((?:[^"\\\x00-\x1f]++|\\.)*+)":\{"data_offsets":\[([0-9]++,[0-9]++)\],'
    r'"dtype":"([A-Z0-9_]++)","shape":\[([0-9,]*+)\]\}'
)
_MEMBER_FRAME = len(',"":{"data_offsets":[],"dtype":"","shape":[]}')
_DECODER = json.JSONDecoder()
_PAIRS_DECODER = json.JSONDecoder(object_pairs_hook=tuple)


class Header:
    """What the first bytes of a checkpoint say.

    Attributes:
        step: optimizer steps made.
        kind: ``periodic``, or ``final`` for one that is never cleaned up.
        state: canonical JSON of the skeleton, the scalars, the config and the metadata.
        run: JSON of what may differ between equal runs.
        state_digest: the identity of the state.
        digest: of the header.
        file_size: in bytes.
        config: the options that change the result.
        metadata: the caller's metadata.
        run_info: what ``run`` says: created, host, metrics and the caller's own.
    """

    format = FORMAT
    lacks_arrays = False  # only a foreign header can be metadata alone

    def __init__(self, metadata: dict[str, str], table: str, data_offset: int, file_size: int) -> None:
        self.step = _integer(metadata["step"], "step")
        self.kind = _kind(metadata["kind"])
        self.state = metadata["state"]
        self.run = metadata["run"]
        self.state_digest = metadata["state_digest"]
        self.digest = metadata["digest"]
        self.file_size = file_size
        self._digests = metadata["digests"]
        self._table_text = table
        self._data_offset = data_offset
        self.config, self.metadata = _plain_sections(self.state, self.step)
        self.run_info = _run_info(self.run)

    @lockfree_cached_property
    def metrics(self) -> dict[str, float]:
        """The numbers of the metadata, and those saved as metrics."""
        candidates = {**self.metadata, **self.saved_metrics}
        return {
            name: value
            for name, value in candidates.items()
            if isinstance(name, str) and isinstance(value, (int, float)) and not isinstance(value, bool)
        }

    @property
    def saved_metrics(self) -> dict[str, float]:
        """What was saved as metrics, without the numbers of the metadata."""
        saved: dict[str, float] = self.run_info["metrics"]
        return saved

    @property
    def measured_on(self) -> str:
        """What the metrics were measured on; empty where that was not said."""
        found: str = self.run_info.get("measured_on", "")
        return found

    @lockfree_cached_property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """In the order of their data.

        Raises:
            CorruptCheckpoint: if they do not fill the data as a writer lays it out.
        """
        return self._table.tensors(self._data_offset, self._each_digest)

    @lockfree_cached_property
    def sections(self) -> dict[str, Any]:
        """The skeleton of each section of the state; together they name every tensor once.

        Raises:
            CorruptCheckpoint: if ``state`` is not what a writer makes.
        """
        with _json_of("state"):
            state = json.loads(self.state)
            _require_same(self.state, canonical_json(state))
        sections = state.get("sections") if type(state) is dict else None
        if type(sections) is not dict or state.get("step") != self.step:
            raise CorruptCheckpoint("the state is not that of the step in the header")
        if (*state,) != _STATE_KEYS or (*sections,) != _SECTIONS:
            raise CorruptCheckpoint(f"the state does not hold {', '.join(_SECTIONS)} and nothing else")
        named: list[str] = []
        for name in STATE_SECTIONS:
            labels: list[str] = []
            if type(tree.unflatten(sections.get(name), labels.append)) is not dict:
                raise CorruptCheckpoint(f"the state has no {name}")
            if labels and name not in ARRAY_SECTIONS:
                raise CorruptCheckpoint(f"{name} names a tensor, {shorten(labels[0])!r}")
            named += labels
        if sorted(named) != self._table.names:
            raise CorruptCheckpoint("the state does not name every tensor of the file once")
        return sections

    def require_intact(self) -> None:
        """Check all that is checked without the tensors' bytes.

        Raises:
            CorruptCheckpoint: with what no writer makes.
        """
        _ = self.sections
        with _json_of("header"):  # lone surrogates have no bytes to digest
            state_digest = self._table.state_digest(self.state, self._each_digest)
            text = HeaderText(
                step=self.step, kind=self.kind, state=self.state, run=self.run, table=self._table
            )
            _, digest = text.complete(self._each_digest, self.state_digest)
        if self.state_digest != state_digest:
            raise CorruptCheckpoint("the state's digest does not match the state")
        # The digest in the file was that of its own bytes: where this one is the same, so are the bytes.
        if self.digest != digest:
            raise CorruptCheckpoint("the header is not in canonical form")

    @lockfree_cached_property
    def _table(self) -> TensorTable:
        names, spans, dtypes, shapes = _columns(self._table_text)
        try:
            table = TensorTable(names, dtypes, shapes)
        except ImpossibleTensor as error:
            name, _ = error.args
            raise CorruptCheckpoint(
                f"tensor {shorten(name)!r} has an unknown dtype or no valid shape"
            ) from None
        if not all(map(lt, [METADATA, *names], names)):
            raise CorruptCheckpoint("the tensors do not stand in the order of their names, each once")
        belong = [*map("%d,%d".__mod__, table.spans())]
        if spans != belong:
            name, span = next((n, b) for n, s, b in zip(names, spans, belong, strict=True) if s != b)
            raise CorruptCheckpoint(f"tensor {shorten(name)!r} does not lie in the bytes {span} of the data")
        if len(self._digests) != DIGEST_CHARACTERS * len(names):
            raise CorruptCheckpoint(f"there are not {len(names)} digests for {len(names)} tensors")
        return table

    @property
    def _each_digest(self) -> list[str]:
        digests = self._digests
        return [digests[at : at + DIGEST_CHARACTERS] for at in range(0, len(digests), DIGEST_CHARACTERS)]


def header_length(first: bytes, file_size: int) -> int:
    """The length of the header and the 8 bytes before it.

    Args:
        first: the first 8 bytes of the file, or more.
        file_size: of the whole file, in bytes.

    Raises:
        CorruptCheckpoint: if no header of that length can be there.
    """
    if len(first) < LENGTH_BYTES:
        raise CorruptCheckpoint(f"{file_size} bytes are too few for a checkpoint")
    length = LENGTH_BYTES + int.from_bytes(first[:LENGTH_BYTES], "little")
    if length > min(file_size, MAX_HEADER_BYTES):
        raise CorruptCheckpoint(
            f"no checkpoint, or cut or overwritten: a header of {length} bytes, a file of {file_size}"
        )
    return length


def parse_header(raw: bytes | bytearray, file_size: int) -> Header:
    """Read and check a header, from its 8 bytes of length to its padding.

    Checked: the digest of the header, the version, every field of the metadata, the scalars of the state,
    the size of the file. The rest is checked when it is asked for: see the module.

    Raises:
        CorruptCheckpoint: with what is wrong.
        UnsupportedVersion: if a later version of the format wrote the file.
    """
    if not raw.startswith(OPENING, LENGTH_BYTES):
        raise CorruptCheckpoint(
            f"not a checkpoint of this library: its header does not begin as one of {FORMAT}"
        )
    # Every version of the format keeps to this, and what follows can rely on it.
    if raw[DIGEST_SLICE] != header_digest(raw).encode():
        raise CorruptCheckpoint("the header's digest does not match the header")
    try:
        text = str(memoryview(raw)[LENGTH_BYTES:], "utf-8")
    except UnicodeDecodeError:
        raise CorruptCheckpoint("the header is not UTF-8") from None
    metadata, end = _metadata(text)
    last = text.rfind("}")
    if text[last + 1 :] != " " * (len(text) - last - 1) or len(raw) % ALIGNMENT:
        raise CorruptCheckpoint("the header does not end with its padding")
    table = text[end:last]
    if not _fill(table, file_size - len(raw)):
        raise CorruptCheckpoint(f"the file has {file_size} bytes, and its header speaks of another number")
    return Header(metadata, table, len(raw), file_size)


def _metadata(text: str) -> tuple[dict[str, str], int]:
    """The metadata, and where it ends."""
    try:
        pairs, end = _PAIRS_DECODER.raw_decode(text, text.index("{", 1))
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"the header is not the JSON that a writer makes ({error})") from None
    metadata = dict(pairs)
    if metadata.get("format") != FORMAT or len(metadata) != len(pairs):
        raise CorruptCheckpoint(f"not a checkpoint of this library: its metadata names no format {FORMAT!r}")
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


def _fill(table: str, data_bytes: int) -> bool:
    """Whether the data of the tensors ends where the file ends, by the text of the table alone.

    In canonical form their data has no gaps, so that is where one ends and no other begins, but for those of
    no length. No name can be taken for an offset: in a JSON string a quote has a backslash before it.
    """
    begin = table.count(f'":{{"data_offsets":[{data_bytes},')
    empty = table.count(f'":{{"data_offsets":[{data_bytes},{data_bytes}],"dtype":')
    return begin == empty and (data_bytes == 0 or f',{data_bytes}],"dtype":' in table)


def _plain_sections(state: str, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config and the metadata, without parsing the skeletons of the tensors behind them."""
    nodes: dict[str, Any] = {}
    end = len('{"sections":')
    with _json_of("state"):
        for name in _FIRST_SECTIONS:
            nodes[name], end = _DECODER.raw_decode(state, end + len(f',"{name}":'))
        _require_same(state[:end], '{"sections":' + canonical_json(nodes)[:-1])
    config, metadata = (tree.unflatten(nodes[name], _refuse_tensor) for name in ("config", "metadata"))
    if type(config) is not dict or type(metadata) is not dict:
        raise CorruptCheckpoint("the state has no config or no metadata")
    if not state.endswith(f',"step":{step}}}'):
        raise CorruptCheckpoint("the state is not that of the step in the header")
    return config, metadata


def _refuse_tensor(label: str) -> None:
    raise CorruptCheckpoint(f"config or metadata names a tensor, {shorten(label)!r}")


def _run_info(text: str) -> dict[str, Any]:
    with _json_of("run"):
        run = json.loads(text)
        _require_same(text, compact_json(run))  # its keys stand as the caller gave them
    if type(run) is not dict or any(type(run.get(part)) is not dict for part in ("metrics", "extra")):
        raise CorruptCheckpoint("the header's run is not what a writer makes")
    if type(run.get("measured_on", "")) is not str:
        raise CorruptCheckpoint("the header's run does not say in words what was measured on")
    if tree.is_too_deep(run):
        raise CorruptCheckpoint(f"the header's run is nested deeper than {tree.MAX_DEPTH} levels")
    return run


@contextlib.contextmanager
def _json_of(what: str) -> Iterator[None]:
    """For what is done with JSON that may be hostile."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"the {what} is not the JSON that a writer makes ({error})") from None


def _require_same(text: str, encoded: str) -> None:
    """That JSON is as a writer encodes what was parsed of it."""
    if text != encoded:
        raise ValueError("not in canonical form")
    text.encode()  # no lone surrogates


def _columns(table: str) -> tuple[list[str], list[str], list[str], list[tuple[int, ...]]]:
    """Names, spans ("begin,end"), dtypes and shapes of the tensors, in the order of the text.

    Not by a parser of JSON: a writer gives each member one form, and whatever has another is refused.
    """
    found = _MEMBER.findall(table)
    columns = [*zip(*found, strict=True)] or [()] * 4
    # What was found is in order and without overlaps: if its length is that of the text, it is all of it.
    if sum(map(len, chain.from_iterable(columns))) + _MEMBER_FRAME * len(found) != len(table):
        raise CorruptCheckpoint("not every tensor is described by bytes, dtype and shape as a writer does")
    names, spans, dtypes, shapes = columns
    parsed = {shape: _shape(shape) for shape in {*shapes}}  # there are a few
    return (
        [_name(name) if "\\" in name else name for name in names],
        [*spans],
        [*dtypes],
        [*map(parsed.__getitem__, shapes)],
    )


def _shape(text: str) -> tuple[int, ...]:
    with _json_of("table of tensors"):
        shape = tuple(json.loads(f"[{text}]"))
        _require_same(f"[{text}]", compact_json(shape))
    # Before anybody puts shapes into a set: who may choose the numbers in them chooses their hashes, too.
    if not is_valid_shape(shape):
        raise CorruptCheckpoint(f"no tensor has the shape [{shorten(text)}]")
    return shape


def _name(encoded: str) -> str:
    with _json_of("table of tensors"):
        name: str = json.loads(f'"{encoded}"')
        _require_same(f'"{encoded}"', canonical_json(name))
    return name


def _integer(text: Any, name: str) -> int:
    # 18 digits: no text of an unbounded length is ever parsed as a number.
    digits = type(text) is str and text.isascii() and text.isdigit() and len(text) <= 18
    if not digits or text != str(int(text)):
        raise CorruptCheckpoint(f"the header's {name} is no whole number")
    return int(text)


def _kind(text: str) -> Kind:
    if text not in _KINDS:
        raise CorruptCheckpoint(f"the header's kind {shorten(text)!r} is none of {', '.join(_KINDS)}")
    return cast(Kind, text)
