"""Names in a mirror, and which objects count."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrust.checkpoint.remote.client import ObjectInfo
from distrust.checkpoint.remote.line import (
    RemoteFile,
    bounding_terms,
    line,
    object_name,
    parse_key,
    parse_term,
    parse_terms,
    term_key,
)

STATE = "0123456789abcdef" * 4


def upload(step: int, term: int, kind: str = "periodic") -> RemoteFile:
    name = object_name(step, kind, term, STATE)
    file = parse_key(ObjectInfo(f"checkpoints/{name}", 4096, "e"))
    assert file == RemoteFile(f"checkpoints/{name}", 4096, step, kind, term, STATE[:16])
    return file


def test_what_a_replaced_writer_adds_does_not_count():
    files = [*(upload(step, 1) for step in (30, 25, 20, 15, 10, 5)), upload(25, 2)]

    counting = line(files, {1: 0, 2: 20})

    assert [(file.step, file.term) for file in counting] == [(5, 1), (10, 1), (15, 1), (20, 1), (25, 2)]


@given(st.lists(st.tuples(st.integers(0, 9), st.lists(st.integers(1, 5), max_size=4)), max_size=6))
def test_no_step_of_a_stale_writer_counts(history):
    """Each writer goes on from a step that counts, saves some, is replaced, and then saves a late one."""
    files: list[RemoteFile] = []
    bases: dict[int, int] = {}
    expected: list[tuple[int, int]] = []
    late: list[RemoteFile] = []
    for term, (position, advances) in enumerate(history, 1):
        counting = [file.step for file in line(files, bases)]
        assert [(file.step, file.term) for file in line(files, bases)] == expected
        base = counting[position % len(counting)] if counting else 0
        bases[term] = base
        files += late  # uploads that slip through after the term was given away
        expected = [(step, number) for step, number in expected if step <= base]
        late, step = [], base
        for advance in advances:
            step += advance
            files.append(upload(step, term))
            expected.append((step, term))
        late = [upload(step + 1, term)]
    assert {file.term for file in files if file.term > 1} <= {*bounding_terms(files, parse(bases))} | {1}


def parse(bases):
    return parse_terms(ObjectInfo(term_key(number, "json"), 9, "e") for number in bases)


def test_a_plain_name_counts():
    plain = parse_key(ObjectInfo("checkpoint-40-final.safetensors", 4096, "e"))
    assert plain == RemoteFile("checkpoint-40-final.safetensors", 4096, 40, "final", 0, "")
    assert line([plain, upload(40, 3, "final"), upload(40, 3)], {7: 40}) == [
        upload(40, 3),
        plain,
        upload(40, 3, "final"),
    ]


HOSTILE_NAMES = [
    "checkpoint-5.safetensors\n",
    "checkpoint-05.1-0123456789abcdef.safetensors",
    "checkpoint-5.0-0123456789abcdef.safetensors",
    "checkpoint-5.1-0123456789ABCDEF.safetensors",
    "checkpoint-5.1-0123456789abcde.safetensors",
    "checkpoint-٥.safetensors",
    f"checkpoint-{10**18}.safetensors",
    "checkpoint-5.123456789-0123456789abcdef.safetensors",
    "checkpoint-5",
    "..",
    "",
]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_name_that_no_writer_gives_is_ignored(name):
    assert parse_key(ObjectInfo(name, 4096, "e")) is None
    assert parse_key(ObjectInfo(f"../{name}", 4096, "e")) is None


@given(st.text(), st.integers())
def test_any_key_is_parsed_or_ignored(key, size):
    infos = [ObjectInfo(key, size, ""), ObjectInfo(f"terms/{key}", size, "")]
    assert [parse_key(info) for info in infos] == [None, None]
    assert parse_terms(infos) == {}


def test_a_term_is_what_its_objects_say():
    keys = [term_key(2, "json"), term_key(1, "json"), term_key(1, "end"), term_key(2, "beat")]
    keys += [term_key(3, "beat"), "terms/00000000.json", "terms/4.json", "x/terms/00000005.json"]

    terms = parse_terms(ObjectInfo(key, 9, f"etag of {key}") for key in keys)

    assert list(terms) == [1, 2]
    assert terms[1].has_ended
    assert not terms[2].has_ended
    assert terms[1].beat == ""
    assert terms[2].beat == "etag of terms/00000002.beat"


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b'{"base": "5"}', b'{"base": true}', b'{"base": -1}', b"\xff", b"[" * 10**5],
)
def test_a_term_without_a_base_is_refused(content):
    with pytest.raises(ValueError):  # noqa: PT011 - the caller names the object
        parse_term(content)


def test_a_term_has_its_base():
    assert parse_term(memoryview(json.dumps({"base": 7, "nonce": "a"}).encode())) == {"base": 7, "nonce": "a"}
