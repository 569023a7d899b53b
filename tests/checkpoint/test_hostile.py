"""A reader trusts nothing in a file: whatever it contains, the result is a CheckpointError.

The files here are forged with correct digests, so that the checks behind the digests are tested.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pty
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from campaigns.fuzz.forging import Specimen, canonical, encode_json, frame, sign, state_digest
from distrust import Checkpoint, CheckpointManager
from distrust.checkpoint import catalog, tree
from distrust.errors import (
    CheckpointError,
    CheckpointNotFound,
    CorruptCheckpoint,
    NoIntactCheckpoint,
    UnsupportedState,
    UnsupportedVersion,
)


class Forge(Specimen):
    """A valid checkpoint that tests turn into invalid ones."""

    def __init__(self, directory: Path) -> None:
        with CheckpointManager(directory) as self.manager:
            model = {"a": np.arange(4, dtype=np.float32), "b": np.arange(3, dtype=np.uint8)}
            state = Checkpoint(step=1, model=model, optimizer={"n": [1, (2.5, None)]}, metadata={"m": "x"})
            self.path = self.manager.save(state)
        super().__init__(self.path.read_bytes())

    def write(self, raw: bytes) -> None:
        self.path.write_bytes(raw)

    def write_fields(self, fields: Any) -> None:
        """Write these header fields, with correct digests where possible."""
        self.write(sign(frame(encode_json(fields).encode())) + self.data)

    def write_state(self, change: Callable[[Any], Any]) -> None:
        """Change the skeleton, with correct digests of the state and the header."""
        fields = self.fields
        state = json.loads(fields["__metadata__"]["state"])
        state = change(state) or state
        fields["__metadata__"]["state"] = state if isinstance(state, str) else encode_json(state)
        fields["__metadata__"]["state_digest"] = state_digest(fields)
        self.write_fields(fields)

    def outcomes(self) -> list[type[CheckpointError] | None]:
        """Return the error of each way to read, or None. Any other exception is raised."""

        def inspect_all(path: Path) -> None:
            self.manager.inspect(path).require_intact()

        results: list[type[CheckpointError] | None] = []
        for read in (self.manager.validate, self.manager.load, inspect_all):
            try:
                read(self.path)
            except CheckpointError as error:
                results.append(type(error))
            else:
                results.append(None)
        self.is_listed()
        return results

    def is_listed(self) -> bool:
        """Return whether it is listed as intact; check that everything in a listing is readable."""
        try:
            listed = self.manager.inspect(self.path)
        except CheckpointError:
            assert self.manager.scan().files == ()
            return False
        shown = listed.step, listed.kind, listed.bytes, listed.created, listed.metrics, listed.metadata
        json.dumps(
            [*shown, listed.header.config, listed.header.run_info], skipkeys=True, ensure_ascii=False
        ).encode()
        with contextlib.suppress(CorruptCheckpoint):
            _ = listed.tensors
        return bool(self.manager.scan().files)


@pytest.fixture(scope="module")
def forge(tmp_path_factory) -> Forge:
    return Forge(tmp_path_factory.mktemp("forged"))


def test_forged_file_with_the_original_content_is_identical(forge):
    """The digests of forged files are correct: the tests below fail for the content, not for the digests."""
    forge.write_fields(forge.fields)
    assert forge.path.read_bytes() == forge.raw
    forge.write_state(lambda state: state)
    assert forge.path.read_bytes() == forge.raw
    forge.write_state(lambda state: state["sections"]["metadata"]["d"].update(sm="forged"))
    assert forge.outcomes() == [None, None, None]
    assert forge.manager.load(1).metadata == {"m": "forged"}


def change(*path: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def apply(fields: dict[str, Any]) -> None:
        *parents, last = path
        for name in parents:
            fields = fields[name]
        fields[last] = to

    return apply


A, B, META = "model.a", "model.b", "__metadata__"
HUGE = 10**4290
FIELDS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no metadata": lambda f: f.pop(META) and None,
    "metadata is a list": change(META, to=[]),
    "another format": change(META, "format", to="pt"),
    "version 0": change(META, "version", to="0"),
    "version 01": change(META, "version", to="01"),
    "version of another type": change(META, "version", to=1),
    "version of many digits": change(META, "version", to="1" * 5000),
    "version in other digits": change(META, "version", to="١"),
    "negative step": change(META, "step", to="-1"),
    "step with a leading zero": change(META, "step", to="01"),
    "step in other digits": change(META, "step", to="²"),
    "another step than the state's": change(META, "step", to="2"),
    "unknown kind": change(META, "kind", to="best"),
    "upper-case digest": lambda f: change(META, "state_digest", to=f[META]["state_digest"].upper())(f),
    "wrong state digest": change(META, "state_digest", to="0" * 64),
    "no digest": lambda f: f[META].pop("digest") and None,
    "digest of another type": change(META, "digest", to=0),
    "no digests": change(META, "digests", to=""),
    "one digest too many": lambda f: change(META, "digests", to=f[META]["digests"] + "0" * 64)(f),
    "wrong tensor digests": lambda f: change(META, "digests", to="0" * 128)(f),
    "additional key in the metadata": change(META, "comment", to="x"),
    "additional key in a tensor": change(A, "comment", to="x"),
    "no shape": lambda f: f[A].pop("shape") and None,
    "a tensor is a list": change(A, to=[]),
    "unknown dtype": change(A, "dtype", to="F4"),
    "dtype of another type": change(A, "dtype", to=["F32"]),
    "dtype of another item size": change(A, "dtype", to="F64"),
    "bool in shape": change(A, "shape", to=[4, True]),
    "float in shape": change(A, "shape", to=[4.0]),
    "negative shape": change(A, "shape", to=[-2, -2]),
    "shape of another type": change(A, "shape", to="4"),
    "overflowing shape": change(A, "shape", to=[2**32, 2**32]),
    "overflowing shape of no items": lambda f: f.update(
        {A: {"dtype": "F32", "shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}}
    ),
    "a huge number in shape": change(A, "shape", to=[HUGE]),
    "many dimensions": change(A, "shape", to=[4] + [1] * 10_000),
    "bool in offsets": change(B, "data_offsets", to=[True, 4]),
    "float in offsets": change(A, "data_offsets", to=[0.0, 16.0]),
    "huge offsets": change(A, "data_offsets", to=[-HUGE * 9 * 10**9, HUGE * 9 * 10**9]),
    "three offsets": change(A, "data_offsets", to=[0, 16, 16]),
    "no offsets": change(A, "data_offsets", to=None),
    "negative offsets": change(A, "data_offsets", to=[-16, 0]),
    "reversed offsets": change(A, "data_offsets", to=[16, 0]),
    "overlap": change(B, "data_offsets", to=[13, 16]),
    "gap": change(B, "data_offsets", to=[17, 20]),
    "offsets beyond the end": change(B, "data_offsets", to=[2**62, 2**62 + 3]),
    "swapped order": lambda f: (
        change(A, "data_offsets", to=[3, 19])(f) or change(B, "data_offsets", to=[0, 3])(f)
    ),
    "a missing tensor": lambda f: f.pop(B) and None,
    "lone surrogate in a name": lambda f: f.update({"\ud800": f.pop(B)}),
    "lone surrogate in run": change(META, "run", to='"\ud800"'),
    "not an object": lambda f: [f],
    "null": lambda f: "null",
}


@pytest.mark.parametrize("case", FIELDS)
def test_header_that_no_writer_produces_is_rejected(forge, case):
    fields = forge.fields
    forge.write_fields(FIELDS[case](fields) or fields)
    outcomes = forge.outcomes()
    # Inspecting only the header cannot detect wrong tensor digests.
    assert outcomes[:2] == [CorruptCheckpoint, CorruptCheckpoint]


@pytest.mark.parametrize("case", ["unknown dtype", "bool in shape", "float in offsets", "no digests"])
def test_error_on_access_to_forged_tensors_names_the_file(forge, case):
    """A header with a correct digest is parsed only as far as needed."""
    fields = forge.fields
    FIELDS[case](fields)
    forge.write_fields(fields)
    file = forge.manager.inspect(forge.path)
    assert file.metadata == {"m": "x"}
    with pytest.raises(CorruptCheckpoint) as caught:
        _ = file.tensors
    assert caught.value.path == forge.path


BODIES: dict[str, Callable[[bytes], bytes]] = {
    "a tensor twice": lambda b: b.replace(b'"model.b":', b'"model.b":{},"model.b":'),
    "the metadata twice": lambda b: b.replace(b'"__metadata__":', b'"__metadata__":{},"__metadata__":'),
    "a field twice": lambda b: b.replace(b'"dtype":"U8"', b'"dtype":"F32","dtype":"U8"'),
    "the step twice": lambda b: b.replace(b'"step":"1"', b'"step":"2","step":"1"'),
    "the digest twice": lambda b: b.replace(b'"digest":', b'"digest":"' + b"0" * 64 + b'","digest":'),
    "keys out of order": lambda b: b.replace(b'{"__metadata__"', b'{"z":{},"__metadata__"'),
    "a run nested too deep": lambda b: b.replace(
        b'\\"extra\\":{', b'\\"extra\\":{\\"x\\":' + b"[" * 200 + b"]" * 200
    ),
    "a space": lambda b: b.replace(b":", b": ", 1),
    "a tab in the padding": lambda b: b + b"\t",
    "escapes for plain letters": lambda b: b.replace(b"distrust", b"\\u0064istrust"),
    "a trailing comma": lambda b: b[:-1] + b",}",
    "another document": lambda b: b + b"{}",
    "deep lists": lambda b: b[:-1] + b',"z":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "deep dicts": lambda b: b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
    "unclosed": lambda b: b'{"a":[' * 200_000,
    "a number of a million digits": lambda b: b.replace(b"[0,16]", b"[0," + b"9" * 1_000_000 + b"]"),
    "an infinite number": lambda b: b.replace(b"[0,16]", b"[0,1e999]"),
    "NaN": lambda b: b.replace(b"[0,16]", b"[0,NaN]"),
    "minus zero": lambda b: b.replace(b"[0,16]", b"[-0,16]"),
    "not UTF-8": lambda b: b.replace(b"model.b", b"model.\xff"),
    "a byte order mark": lambda b: b"\xef\xbb\xbf" + b,
    "UTF-16": lambda b: b.decode().encode("utf-16"),
    "nothing": lambda b: b"",
    "a NUL": lambda b: b + b"\0",
}


@pytest.mark.parametrize("case", BODIES)
def test_json_that_no_writer_produces_is_rejected(forge, case):
    body = BODIES[case](forge.body)
    assert body != forge.body
    forge.write(sign(frame(body)) + forge.data)
    assert forge.outcomes() == [CorruptCheckpoint] * 3


#: Every multiple of it has the hash 0.
HASH_MODULUS = 2**61 - 1


def change_in(section: str, to: Any) -> Callable[[Any], None]:
    return lambda state: state["sections"].update({section: to})


def deep_state(levels: int) -> str:
    return '{"sections":{"config":' + '{"l":[' * levels + "]}" * levels + '},"step":1}'


STATES: dict[str, Callable[[Any], Any]] = {
    "a tensor named twice": change_in("rng", {"d": {"sx": {"a": A}}}),
    "an unknown tensor": change_in("rng", {"d": {"sx": {"a": "model.c"}}}),
    "a tensor not named": change_in("model", {"d": {"sa": {"a": A}}}),
    "a tensor in the metadata": lambda s: change_in("metadata", s["sections"].pop("model"))(s),
    "a tensor in the config": lambda s: change_in("config", s["sections"].pop("model"))(s),
    "no model": lambda s: s["sections"].pop("model") and None,
    "a list for a section": change_in("rng", {"l": []}),
    "a bare scalar for a section": change_in("history", 1),
    "an unknown node": change_in("rng", {"d": {"sx": {"z": 1}}}),
    "a node of two kinds": change_in("rng", {"d": {"sx": {"l": [], "t": []}}}),
    "an empty node": change_in("rng", {"d": {"sx": {}}}),
    "a bare list": change_in("rng", {"d": {"sx": []}}),
    "a dict of the wrong type": change_in("rng", {"d": []}),
    "a list of the wrong type": change_in("rng", {"d": {"sx": {"l": {}}}}),
    "a label of the wrong type": change_in("rng", {"d": {"sx": {"a": ["model.a"]}}}),
    "a key without a type": change_in("rng", {"d": {"": 1}}),
    "a key of unknown type": change_in("rng", {"d": {"x1": 1}}),
    "a key that is no int": change_in("rng", {"d": {"ione": 1}}),
    "a key of a million digits": change_in("rng", {"d": {"i" + "9" * 1_000_000: 1}}),
    "a key that is no float": change_in("rng", {"d": {"f1,5": 1}}),
    "a key that is no bool": change_in("rng", {"d": {"bTRUE": 1}}),
    "keys that are equal": change_in("rng", {"d": {"bTrue": 0, "i1": 0}}),
    "keys of one hash": change_in("rng", {"d": {f"i{HASH_MODULUS * at}": 0 for at in range(2000)}}),
    "another section": lambda s: s["sections"].update(zeta={"x": 1, "y": 2}),
    "an additional key": lambda s: s.update(sf=1),
    "another step": lambda s: s.update(step=2),
    "no sections": lambda s: s.pop("sections") and None,
    "no state": lambda s: "null",
    "not JSON": lambda s: "{",
    "a list": lambda s: "[]",
    "a key twice": lambda s: canonical(s).replace('"step":', '"step":2,"step":'),
    "too deep": lambda s: deep_state(150),
    "far too deep": lambda s: deep_state(100_000),
    "a number of a million digits": lambda s: canonical(s).replace('"step":1', '"step":' + "1" * 1_000_000),
}


@pytest.mark.parametrize("case", STATES)
def test_state_that_no_writer_produces_is_rejected(forge, case):
    forge.write_state(STATES[case])
    assert forge.outcomes() == [CorruptCheckpoint] * 3
    with pytest.raises(NoIntactCheckpoint):
        forge.manager.load_latest()


@pytest.mark.parametrize(
    "case",
    [
        "a tensor in the metadata", "a tensor in the config", "another step", "no sections", "no state",
        "not JSON", "a list", "too deep", "far too deep", "a number of a million digits",
    ],
)  # fmt: skip
def test_state_with_invalid_scalars_is_listed_as_damaged(forge, case):
    forge.write_state(STATES[case])
    scan = forge.manager.scan()
    assert ([file.path for file in scan.damaged], scan.files) == ([forge.path], ())


@pytest.mark.parametrize(
    "length", [0, 1, 2, 4087, 4089, 100_000_001, 2**31, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1]
)
def test_false_header_length_is_rejected(forge, length):
    forge.write(length.to_bytes(8, "little") + forge.raw[8:])
    assert forge.outcomes() == [CorruptCheckpoint] * 3


def test_later_version_of_the_format_is_rejected_as_such(forge):
    """Not as damaged: it may be intact."""
    fields = forge.fields
    fields[META]["version"] = "2"
    fields[META]["of the future"] = "x"
    forge.write_fields(fields)

    assert forge.outcomes() == [UnsupportedVersion] * 3
    for read in (forge.manager.load, forge.manager.validate, forge.manager.inspect):
        with pytest.raises(UnsupportedVersion, match="version 2") as caught:
            read(1)
        assert str(caught.value).count(str(forge.path)) == 1
    (listed,) = forge.manager.scan().damaged
    assert "version 2" in listed.reason
    assert str(forge.path) not in listed.reason
    # No fallback to an older checkpoint: that would lose its progress.
    with pytest.raises(UnsupportedVersion, match="version 2"):
        forge.manager.load_latest()


def test_flipped_bit_in_the_version_is_damage(forge):
    """Not a later version: the header's digest does not match."""
    forge.write(forge.raw.replace(b'"version":"1"', b'"version":"3"'))
    assert forge.outcomes() == [CorruptCheckpoint] * 3


nodes = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from([A, "F32", "1", "0" * 64, 2**63, 2**64, -1, "\ud800", 1e300]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip


def mutate(tree: Any, choice: Callable[[st.SearchStrategy[Any]], Any]) -> Any:
    """Return the tree with one node replaced, removed or added."""
    tree = copy.deepcopy(tree)
    positions = [(None, None)]

    def walk(node: Any) -> None:
        children = (
            node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        )
        for key, child in children:
            positions.append((node, key))
            walk(child)

    walk(tree)
    parent, key = choice(st.sampled_from(positions[1:]))
    action = choice(st.sampled_from(["replace", "remove", "add"]))
    if action == "replace":
        parent[key] = choice(nodes)
    elif action == "remove":
        del parent[key]
    elif isinstance(parent, dict):
        parent[choice(st.text(max_size=8) | st.sampled_from([A, B, "d", "l", "a"]))] = choice(nodes)
    else:
        parent.insert(key, choice(nodes))
    return tree


def check_consistent(forge: Forge) -> None:
    """Check that validate and load agree and raise only CheckpointErrors, and that a valid file is listed."""
    validated, loaded, inspected = forge.outcomes()
    assert validated == loaded
    assert inspected is None or inspected == loaded
    assert loaded is not None or forge.is_listed()


@settings(max_examples=150)
@given(st.data())
def test_any_changed_header_field_gives_a_checkpoint_error(forge, data):
    forge.write_fields(mutate(forge.fields, data.draw))
    check_consistent(forge)


@settings(max_examples=150)
@given(st.data())
def test_any_changed_state_gives_a_checkpoint_error(forge, data):
    forge.write_state(lambda state: mutate(state, data.draw))
    check_consistent(forge)


@settings(max_examples=150)
@given(st.data())
def test_any_changed_header_byte_gives_a_checkpoint_error(forge, data):
    body = forge.body
    begin = data.draw(st.integers(0, len(body)))
    end = data.draw(st.integers(begin, min(len(body), begin + 8)))
    snippet = data.draw(
        st.binary(max_size=8)
        | st.sampled_from(
            [b"{", b"}", b"[", b'"', b",", b":", b"\\", b"\\ud800", b"9" * 5000, b"-", b"true", b"null"]
        )
    )
    forge.write(sign(frame(body[:begin] + snippet + body[end:])) + forge.data)
    check_consistent(forge)


@settings(max_examples=200)
@given(st.binary(max_size=200), st.booleans())
def test_arbitrary_bytes_give_a_checkpoint_error(forge, raw, with_length):
    forge.write((len(raw).to_bytes(8, "little") if with_length else b"") + raw)
    assert forge.outcomes() == [CorruptCheckpoint] * 3


@settings(max_examples=150)
@given(st.data())
def test_any_damaged_header_byte_is_detected_by_reading_the_header(forge, data):
    """Not forged: the digest is the original one."""
    position = data.draw(st.integers(0, forge.end - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda byte: byte != forge.raw[position]))
    forge.write(forge.raw[:position] + bytes([byte]) + forge.raw[position + 1 :])
    with pytest.raises(CorruptCheckpoint):
        forge.manager.inspect(forge.path)
    scan = forge.manager.scan()
    assert ([file.path for file in scan.damaged], scan.files) == ([forge.path], ())


@pytest.mark.parametrize("additional", [-19, -16, -4, -3, -1, 1, 4, 4096])
def test_file_of_another_size_is_listed_as_damaged(forge, additional):
    """Including one that ends between two tensors."""
    forge.write((forge.raw + b"\0" * 4096)[: len(forge.raw) + additional])
    assert not forge.is_listed()
    with pytest.raises(CorruptCheckpoint, match="bytes"):
        forge.manager.inspect(forge.path)


LIKE_AN_OFFSET = [
    'x":{"data_offsets":[4,',
    'x":{"data_offsets":[4,4],"dtype":',
    ',8],"dtype":',
    "\\",
    '"',
    "~",
    "\x1f\n",
]


@pytest.mark.parametrize("empty", [(), ("~z",)], ids=["no empty tensor", "an empty tensor at the end"])
def test_names_that_look_like_offsets_are_not_mistaken_for_them(tmp_path, empty):
    model = {name: np.zeros(1, np.float32) for name in LIKE_AN_OFFSET}
    model |= {name: np.zeros(0, np.float32) for name in empty}
    with CheckpointManager(tmp_path) as manager:
        path = manager.save(Checkpoint(step=1, model=model))
    manager.validate(1)
    raw = path.read_bytes()
    for size in range(len(raw) - 4 * len(LIKE_AN_OFFSET), len(raw) + 5):
        path.write_bytes((raw + bytes(4))[:size])
        assert len(manager.scan().files) == (size == len(raw)), size


OBSTACLES: dict[str, Callable[[Path], object]] = {
    "an empty file": lambda path: path.touch(),
    "a directory": lambda path: path.mkdir(),
    "a pipe": lambda path: os.mkfifo(path),
    "a link to itself": lambda path: path.symlink_to(path),
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_obstacle_at_the_name_of_a_checkpoint_is_a_damaged_checkpoint(tmp_path, obstacle):
    path = tmp_path / "checkpoint-5.safetensors"
    OBSTACLES[obstacle](path)
    manager = CheckpointManager(tmp_path)

    assert [file.path for file in manager.scan().damaged] == [path]
    assert manager.list_checkpoints() == []
    for read in (manager.load, manager.validate, manager.inspect):
        with pytest.raises((CorruptCheckpoint, CheckpointNotFound)):
            read(5)
    with pytest.raises(NoIntactCheckpoint):
        manager.load_latest()


@pytest.mark.parametrize("keys", [("i1", "i01"), ("i1", "i 1"), ("i10", "i1_0"), ("f1.0", "f1.00"), ("i-0",)])
def test_non_canonical_keys_are_rejected(keys):
    node = {"d": dict.fromkeys(keys, 0)}
    with pytest.raises(CorruptCheckpoint, match="a key that cannot be read"):
        tree.unflatten(node, str)


def test_dict_with_many_colliding_keys_is_not_saved_either(tmp_path):
    keys = {HASH_MODULUS * at: 0 for at in range(2000)}
    with CheckpointManager(tmp_path) as manager:
        with pytest.raises(UnsupportedState, match="same hash"):
            manager.save(Checkpoint(step=1, metadata={"m": keys}))
        few = dict(list(keys.items())[:900]) | {-1: 0, -2: 0}
        manager.save(Checkpoint(step=1, metadata={"m": few}))
        assert manager.load(1).metadata == {"m": few}


def test_run_may_be_nested_as_deep_as_the_reader_accepts(tmp_path):
    def make_nested(levels: int) -> Any:
        return [make_nested(levels - 1)] if levels else 1

    with CheckpointManager(tmp_path) as manager:
        manager.save(Checkpoint(step=1, run={"deep": make_nested(tree.MAX_DEPTH - 2)}))
        assert manager.inspect(1).header.run_info["extra"] == {"deep": make_nested(tree.MAX_DEPTH - 2)}
        with pytest.raises(UnsupportedState, match="nested deeper"):
            manager.save(Checkpoint(step=2, run={"deep": make_nested(tree.MAX_DEPTH - 1)}))


ESCAPES = "\x1b[2J\u202e\n"


def test_messages_are_short_and_contain_no_terminal_escapes(tmp_path):
    name = ESCAPES + "x" * 10_000
    with CheckpointManager(tmp_path) as manager:
        path = manager.save(Checkpoint(step=1, model={name: np.zeros(3)}, metrics={name: 1.0}))
        with pytest.raises(CheckpointNotFound) as of_metrics:
            manager.load_best()
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        with pytest.raises(CorruptCheckpoint, match="is damaged") as of_tensors:
            manager.validate(1)
    for caught in (of_metrics, of_tensors):
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 1000
    assert of_tensors.value.tensor == f"model.{name}"


@pytest.mark.parametrize("replacement", ["nothing", "a link to itself", "a link that is too long"])
def test_file_removed_or_replaced_between_listing_and_opening(tmp_path, monkeypatch, replacement):
    """The scan cache must not return the removed file."""
    monkeypatch.setattr(catalog, "STABLE_AFTER_NANOSECONDS", -1)
    with CheckpointManager(tmp_path) as manager:
        path = manager.save(Checkpoint(step=1))
    cache: catalog.ScanCache = {}
    assert len(catalog.scan(tmp_path, cache).files) == 1
    assert path in cache

    names = catalog.list_names(tmp_path)
    path.unlink()
    if replacement != "nothing":
        path.symlink_to(path if replacement == "a link to itself" else "x" * 300)
    listings = iter([names])
    monkeypatch.setattr(catalog, "list_names", lambda directory: next(listings, []))
    scan = catalog.scan(tmp_path, cache)
    assert scan.files == ()
    assert len(scan.damaged) == (replacement != "nothing")


def test_link_that_cannot_be_followed_is_not_a_directory(tmp_path):
    target = tmp_path / "run"
    target.symlink_to("x" * 300)
    for read in (catalog.newest, catalog.resolve, catalog.verify):
        with pytest.raises(CheckpointError):
            read(target)
    (tmp_path / "checkpoints").symlink_to("x" * 300)
    assert catalog.checkpoint_directory(tmp_path) == tmp_path


def test_link_to_a_terminal_does_not_become_the_controlling_terminal(tmp_path, run_python):
    """Whoever has the other end could terminate the process with a key."""
    controller, terminal = pty.openpty()
    try:
        (tmp_path / "checkpoint-1.safetensors").symlink_to(os.ttyname(terminal))
        code = """
import os, sys
from pathlib import Path
from distrust.checkpoint import catalog
os.setsid()
(damaged,) = catalog.scan(Path(sys.argv[1])).damaged
assert "not a regular file" in damaged.reason, damaged.reason
try:
    os.open("/dev/tty", os.O_RDWR)
except OSError:
    print("none")
"""
        process = run_python(code, tmp_path)
        assert (process.stdout, process.stderr) == ("none\n", "")
    finally:
        os.close(controller)
        os.close(terminal)
