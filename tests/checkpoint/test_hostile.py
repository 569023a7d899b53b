"""A reader trusts nothing that a file says of itself: whatever it says, the answer is a CheckpointError.

The files here are forged: their digests are right, so that the checks behind the digests are tried.
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
    """A good checkpoint, to be made into bad ones."""

    def __init__(self, directory: Path) -> None:
        with CheckpointManager(directory) as self.manager:
            model = {"a": np.arange(4, dtype=np.float32), "b": np.arange(3, dtype=np.uint8)}
            state = Checkpoint(step=1, model=model, optimizer={"n": [1, (2.5, None)]}, metadata={"m": "x"})
            self.path = self.manager.save(state)
        super().__init__(self.path.read_bytes())

    def put(self, raw: bytes) -> None:
        self.path.write_bytes(raw)

    def put_fields(self, fields: Any) -> None:
        """Signs what can be signed."""
        self.put(sign(frame(encode_json(fields).encode())) + self.data)

    def put_state(self, change: Callable[[Any], Any]) -> None:
        """Change the skeleton, and give the state and the header their right digests."""
        fields = self.fields
        state = json.loads(fields["__metadata__"]["state"])
        state = change(state) or state
        fields["__metadata__"]["state"] = state if isinstance(state, str) else encode_json(state)
        fields["__metadata__"]["state_digest"] = state_digest(fields)
        self.put_fields(fields)

    def outcomes(self) -> list[type[CheckpointError] | None]:
        """What each way of reading says. Anything but a CheckpointError goes through."""

        def inspect_all(path: Path) -> None:
            self.manager.inspect(path).require_intact()

        found: list[type[CheckpointError] | None] = []
        for use in (self.manager.validate, self.manager.load, inspect_all):
            try:
                use(self.path)
            except CheckpointError as error:
                found.append(type(error))
            else:
                found.append(None)
        self.list_it()
        return found

    def list_it(self) -> bool:
        """Whether it is listed as good; whatever a listing shows of it can then be read."""
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


def test_a_forged_file_that_says_what_the_real_one_says_is_the_real_one(forge):
    """The forger of these tests can sign: what follows is refused for what it says, not for its digests."""
    forge.put_fields(forge.fields)
    assert forge.path.read_bytes() == forge.raw
    forge.put_state(lambda state: state)
    assert forge.path.read_bytes() == forge.raw
    forge.put_state(lambda state: state["sections"]["metadata"]["d"].update(sm="forged"))
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
    "step with a zero before": change(META, "step", to="01"),
    "step in other digits": change(META, "step", to="²"),
    "another step than the state's": change(META, "step", to="2"),
    "unknown kind": change(META, "kind", to="best"),
    "upper-case digest": lambda f: change(META, "state_digest", to=f[META]["state_digest"].upper())(f),
    "wrong state digest": change(META, "state_digest", to="0" * 64),
    "no digest": lambda f: f[META].pop("digest") and None,
    "digest of another type": change(META, "digest", to=0),
    "no digests": change(META, "digests", to=""),
    "one digest too many": lambda f: change(META, "digests", to=f[META]["digests"] + "0" * 64)(f),
    "digest of no tensor": lambda f: change(META, "digests", to="0" * 128)(f),
    "another key in the metadata": change(META, "comment", to="x"),
    "a key in a tensor": change(A, "comment", to="x"),
    "no shape": lambda f: f[A].pop("shape") and None,
    "a tensor is a list": change(A, to=[]),
    "unknown dtype": change(A, "dtype", to="F4"),
    "dtype of another type": change(A, "dtype", to=["F32"]),
    "dtype that wraps": change(A, "dtype", to="F64"),
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
    "offsets turned round": change(A, "data_offsets", to=[16, 0]),
    "overlap": change(B, "data_offsets", to=[13, 16]),
    "gap": change(B, "data_offsets", to=[17, 20]),
    "behind the end": change(B, "data_offsets", to=[2**62, 2**62 + 3]),
    "swapped order": lambda f: (
        change(A, "data_offsets", to=[3, 19])(f) or change(B, "data_offsets", to=[0, 3])(f)
    ),
    "a tensor too few": lambda f: f.pop(B) and None,
    "lone surrogate in a name": lambda f: f.update({"\ud800": f.pop(B)}),
    "lone surrogate in run": change(META, "run", to='"\ud800"'),
    "not an object": lambda f: [f],
    "null": lambda f: "null",
}


@pytest.mark.parametrize("what", FIELDS)
def test_a_header_that_no_writer_makes_is_refused(forge, what):
    fields = forge.fields
    forge.put_fields(FIELDS[what](fields) or fields)
    outcomes = forge.outcomes()
    # The header alone does not know the tensors' bytes.
    assert outcomes[:2] == [CorruptCheckpoint, CorruptCheckpoint]


@pytest.mark.parametrize("what", ["unknown dtype", "bool in shape", "float in offsets", "no digests"])
def test_who_asks_for_forged_tensors_is_told_of_which_file(forge, what):
    """Of a header that proves itself only what is asked for is read."""
    fields = forge.fields
    FIELDS[what](fields)
    forge.put_fields(fields)
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
    "a run nested deeper than it can be printed": lambda b: b.replace(
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


@pytest.mark.parametrize("what", BODIES)
def test_json_that_no_writer_makes_is_refused(forge, what):
    body = BODIES[what](forge.body)
    assert body != forge.body
    forge.put(sign(frame(body)) + forge.data)
    assert forge.outcomes() == [CorruptCheckpoint] * 3


#: Every multiple of it has the hash 0.
SAME_HASH = 2**61 - 1


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
    "keys of one hash": change_in("rng", {"d": {f"i{SAME_HASH * at}": 0 for at in range(2000)}}),
    "another section": lambda s: s["sections"].update(zeta={"x": 1, "y": 2}),
    "another key beside the sections": lambda s: s.update(sf=1),
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


@pytest.mark.parametrize("what", STATES)
def test_a_state_that_no_writer_makes_is_refused(forge, what):
    forge.put_state(STATES[what])
    assert forge.outcomes() == [CorruptCheckpoint] * 3
    with pytest.raises(NoIntactCheckpoint):
        forge.manager.load_latest()


@pytest.mark.parametrize(
    "what",
    [
        "a tensor in the metadata", "a tensor in the config", "another step", "no sections", "no state",
        "not JSON", "a list", "too deep", "far too deep", "a number of a million digits",
    ],
)  # fmt: skip
def test_a_state_whose_scalars_no_writer_makes_is_listed_as_damaged(forge, what):
    forge.put_state(STATES[what])
    scan = forge.manager.scan()
    assert ([file.path for file in scan.damaged], scan.files) == ([forge.path], ())


@pytest.mark.parametrize(
    "length", [0, 1, 2, 4087, 4089, 100_000_001, 2**31, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1]
)
def test_a_header_length_that_is_a_lie_is_refused(forge, length):
    forge.put(length.to_bytes(8, "little") + forge.raw[8:])
    assert forge.outcomes() == [CorruptCheckpoint] * 3


def test_a_later_version_is_refused_by_name(forge):
    """It is not called damaged: it may be whole."""
    fields = forge.fields
    fields[META]["version"] = "2"
    fields[META]["of the future"] = "x"
    forge.put_fields(fields)

    assert forge.outcomes() == [UnsupportedVersion] * 3
    for use in (forge.manager.load, forge.manager.validate, forge.manager.inspect):
        with pytest.raises(UnsupportedVersion, match="version 2") as caught:
            use(1)
        assert str(caught.value).count(str(forge.path)) == 1
    (listed,) = forge.manager.scan().damaged
    assert "version 2" in listed.reason
    assert str(forge.path) not in listed.reason
    # Nor is an older one taken in its place: that would lose what it holds.
    with pytest.raises(UnsupportedVersion, match="version 2"):
        forge.manager.load_latest()


def test_a_flipped_bit_in_the_version_is_damage(forge):
    """Not a later version: the header's digest tells."""
    forge.put(forge.raw.replace(b'"version":"1"', b'"version":"3"'))
    assert forge.outcomes() == [CorruptCheckpoint] * 3


nodes = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from([A, "F32", "1", "0" * 64, 2**63, 2**64, -1, "\ud800", 1e300]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip


def mutated(tree: Any, choice: Callable[[st.SearchStrategy[Any]], Any]) -> Any:
    """The tree with one node, anywhere in it, replaced, removed or added."""
    tree = copy.deepcopy(tree)
    places = [(None, None)]

    def walk(node: Any) -> None:
        children = (
            node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        )
        for key, child in children:
            places.append((node, key))
            walk(child)

    walk(tree)
    parent, key = choice(st.sampled_from(places[1:]))
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


def accepted_alike(forge: Forge) -> None:
    """All who read it whole are of one mind, and say nothing but CheckpointErrors; a good one is listed."""
    validated, loaded, inspected = forge.outcomes()
    assert validated == loaded
    assert inspected is None or inspected == loaded
    assert loaded is not None or forge.list_it()


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_change_of_a_header_is_answered_with_a_checkpoint_error(forge, data):
    forge.put_fields(mutated(forge.fields, data.draw))
    accepted_alike(forge)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_change_of_a_state_is_answered_with_a_checkpoint_error(forge, data):
    forge.put_state(lambda state: mutated(state, data.draw))
    accepted_alike(forge)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_change_of_the_headers_bytes_is_answered_with_a_checkpoint_error(forge, data):
    body = forge.body
    begin = data.draw(st.integers(0, len(body)))
    end = data.draw(st.integers(begin, min(len(body), begin + 8)))
    snippet = data.draw(
        st.binary(max_size=8)
        | st.sampled_from(
            [b"{", b"}", b"[", b'"', b",", b":", b"\\", b"\\ud800", b"9" * 5000, b"-", b"true", b"null"]
        )
    )
    forge.put(sign(frame(body[:begin] + snippet + body[end:])) + forge.data)
    accepted_alike(forge)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_at_all_are_answered_with_a_checkpoint_error(forge, raw, with_length):
    forge.put((len(raw).to_bytes(8, "little") if with_length else b"") + raw)
    assert forge.outcomes() == [CorruptCheckpoint] * 3


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_damage_to_the_header_is_seen_by_who_reads_only_that(forge, data):
    """Not forged: its digest is the old one."""
    at = data.draw(st.integers(0, forge.end - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda byte: byte != forge.raw[at]))
    forge.put(forge.raw[:at] + bytes([byte]) + forge.raw[at + 1 :])
    with pytest.raises(CorruptCheckpoint):
        forge.manager.inspect(forge.path)
    scan = forge.manager.scan()
    assert ([file.path for file in scan.damaged], scan.files) == ([forge.path], ())


@pytest.mark.parametrize("bytes_more", [-19, -16, -4, -3, -1, 1, 4, 4096])
def test_a_file_of_another_size_is_listed_as_damaged(forge, bytes_more):
    """Cut between two tensors, too."""
    forge.put((forge.raw + b"\0" * 4096)[: len(forge.raw) + bytes_more])
    assert not forge.list_it()
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


@pytest.mark.parametrize("empty", [(), ("~z",)], ids=["full", "with an empty one at the end"])
def test_no_name_is_taken_for_an_offset(tmp_path, empty):
    model = {name: np.zeros(1, np.float32) for name in LIKE_AN_OFFSET}
    model |= {name: np.zeros(0, np.float32) for name in empty}
    with CheckpointManager(tmp_path) as manager:
        path = manager.save(Checkpoint(step=1, model=model))
    manager.validate(1)
    raw = path.read_bytes()
    for size in range(len(raw) - 4 * len(LIKE_AN_OFFSET), len(raw) + 5):
        path.write_bytes((raw + bytes(4))[:size])
        assert len(manager.scan().files) == (size == len(raw)), size


THINGS_IN_THE_WAY: dict[str, Callable[[Path], object]] = {
    "an empty file": lambda path: path.touch(),
    "a directory": lambda path: path.mkdir(),
    "a pipe": lambda path: os.mkfifo(path),
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("thing", THINGS_IN_THE_WAY)
def test_things_that_are_no_files_are_damaged_checkpoints(tmp_path, thing):
    path = tmp_path / "checkpoint-5.safetensors"
    THINGS_IN_THE_WAY[thing](path)
    manager = CheckpointManager(tmp_path)

    assert [file.path for file in manager.scan().damaged] == [path]
    assert manager.list_checkpoints() == []
    for use in (manager.load, manager.validate, manager.inspect):
        with pytest.raises((CorruptCheckpoint, CheckpointNotFound)):
            use(5)
    with pytest.raises(NoIntactCheckpoint):
        manager.load_latest()


@pytest.mark.parametrize("keys", [("i1", "i01"), ("i1", "i 1"), ("i10", "i1_0"), ("f1.0", "f1.00"), ("i-0",)])
def test_keys_that_would_become_one_are_refused(keys):
    node = {"d": dict.fromkeys(keys, 0)}
    with pytest.raises(CorruptCheckpoint, match="a key that cannot be read"):
        tree.unflatten(node, str)


def test_what_was_chosen_to_make_a_dict_slow_is_not_saved_either(tmp_path):
    keys = {SAME_HASH * at: 0 for at in range(2000)}
    with CheckpointManager(tmp_path) as manager:
        with pytest.raises(UnsupportedState, match="same hash"):
            manager.save(Checkpoint(step=1, metadata={"m": keys}))
        few = dict(list(keys.items())[:900]) | {-1: 0, -2: 0}
        manager.save(Checkpoint(step=1, metadata={"m": few}))
        assert manager.load(1).metadata == {"m": few}


def test_a_run_is_nested_as_deep_as_it_can_be_printed(tmp_path):
    def nested(levels: int) -> Any:
        return [nested(levels - 1)] if levels else 1

    with CheckpointManager(tmp_path) as manager:
        manager.save(Checkpoint(step=1, run={"deep": nested(tree.MAX_DEPTH - 2)}))
        assert manager.inspect(1).header.run_info["extra"] == {"deep": nested(tree.MAX_DEPTH - 2)}
        with pytest.raises(UnsupportedState, match="nested deeper"):
            manager.save(Checkpoint(step=2, run={"deep": nested(tree.MAX_DEPTH - 1)}))


COMMAND = "\x1b[2J\u202e\n"


def test_messages_are_short_and_command_no_terminal(tmp_path):
    name = COMMAND + "x" * 10_000
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


@pytest.mark.parametrize("instead", ["nothing", "a link to itself", "a link that is too long"])
def test_what_was_known_and_is_not_there_any_more(tmp_path, monkeypatch, instead):
    """Between its name in the listing and the look at it; a manager that lists again looks at no more."""
    monkeypatch.setattr(catalog, "STABLE_AFTER_NANOSECONDS", -1)
    with CheckpointManager(tmp_path) as manager:
        path = manager.save(Checkpoint(step=1))
    known: catalog.Known = {}
    assert len(catalog.scan(tmp_path, known).files) == 1
    assert path in known

    named = catalog.list_names(tmp_path)
    path.unlink()
    if instead != "nothing":
        path.symlink_to(path if instead == "a link to itself" else "x" * 300)
    listings = iter([named])
    monkeypatch.setattr(catalog, "list_names", lambda directory: next(listings, []))
    scan = catalog.scan(tmp_path, known)
    assert scan.files == ()
    assert len(scan.damaged) == (instead != "nothing")


def test_a_link_that_cannot_be_followed_is_no_directory(tmp_path):
    target = tmp_path / "run"
    target.symlink_to("x" * 300)
    for use in (catalog.newest, catalog.resolve, catalog.verify):
        with pytest.raises(CheckpointError):
            use(target)
    (tmp_path / "checkpoints").symlink_to("x" * 300)
    assert catalog.checkpoint_directory(tmp_path) == tmp_path


def test_a_link_to_a_terminal_does_not_become_that_of_the_process(tmp_path, run_python):
    """Whoever holds the other end could end the process with a key."""
    other, terminal = pty.openpty()
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
        done = run_python(code, tmp_path)
        assert (done.stdout, done.stderr) == ("none\n", "")
    finally:
        os.close(other)
        os.close(terminal)
