"""Data in a store: read as from a file, downloaded once for each version, never half."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrust import remote_copies
from distrust.checkpoint.remote import client as clients
from distrust.checkpoint.remote.client import ObjectInfo
from distrust.checkpoint.remote.location import Location, parse
from distrust.cli import main
from distrust.data import Columns, open_source
from distrust.errors import DataError, DistrustError, RemoteError
from distrust.testing.models import write_records
from tests.remote.conftest import Remote

URL = "s3://bucket/data"


class MemoryStore:
    """A store in memory that counts what is read, and can fail in a read."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        self.objects, self.reads = objects, 0
        self.on_read: Callable[[], Any] = lambda: None

    def connect(self, location: Location) -> MemoryClient:
        return MemoryClient(self, location)


class MemoryClient:
    def __init__(self, store: MemoryStore, location: Location) -> None:
        self.store, self.location = store, location

    def read(self, key: str, begin: int, end: int) -> memoryview | None:
        content = self.store.objects[(self.location / key).key][begin:end]
        self.store.reads += 1
        self.store.on_read()
        return memoryview(content)

    def head(self, key: str) -> ObjectInfo | None:
        content = self.store.objects.get((self.location / key).key)
        return None if content is None else ObjectInfo(key, len(content), f"etag {content!r}")

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        start = f"{self.location.key}/"
        return [
            ObjectInfo(key.removeprefix(start), len(content), f"etag {content!r}")
            for key, content in self.store.objects.items()
            if key.startswith(start + prefix)
        ]

    def put(self, key: str, content: bytes | BinaryIO) -> None:
        raise NotImplementedError

    create = delete = put


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    store = MemoryStore({"data/x.jsonl": b'{"text": "ore"}\n{"text": 7}\n'})
    monkeypatch.setattr(remote_copies, "connect", store.connect)
    return store


def texts_of(name: str, cache: Path, **options: Any) -> list[str]:
    source = open_source(name, Columns(), temp_folder=cache, **options)
    return [str(fields["text"]) for part in source.parts for _, fields in part.rows()]  # type: ignore[index]


def below(folder: Path) -> list[str]:
    """All files, except hidden ones."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("[!.]*") if path.is_file())


def test_a_url_is_read_as_the_file_is(
    s3: Remote, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_records(tmp_path / "x.jsonl")
    clients.connect(parse(s3.url, "")).put("x.jsonl", file.read_bytes())
    cache = tmp_path / "cache"
    monkeypatch.setenv("DISTRUST_CACHE", str(cache))
    outputs = []
    for name in (str(file), f"{s3.url}/x.jsonl", f"{s3.url}/", s3.url):
        assert main(["weigh", name, "--json", "--top", "0"]) == 0
        outputs.append({**json.loads(capsys.readouterr().out), "data": None})
    assert outputs.count(outputs[0]) == 4
    assert len(below(cache)) == 1
    digests = {
        source.parts[0].digest
        for source in (open_source(str(file), Columns()), open_source(f"{s3.url}/x.jsonl", Columns()))
    }
    assert len(digests) == 1  # the content is the identity
    clients.connect(parse(s3.url, "")).put("x.jsonl", b'{"authority_weight": "high"}\n')  # another version
    assert main(["weigh", f"{s3.url}/x.jsonl"]) == 1
    assert f"{s3.url}/x.jsonl:1: authority_weight: " in capsys.readouterr().err
    assert len(below(cache)) == 2


def test_each_version_is_downloaded_once(memory: MemoryStore, tmp_path: Path) -> None:
    for expected in (1, 1):
        assert texts_of(f"{URL}/x.jsonl", tmp_path) == ["ore", "7"]
        assert memory.reads == expected
    memory.objects["data/x.jsonl"] = b'{"text": "tin"}\n'
    assert texts_of(f"{URL}/x.jsonl", tmp_path) == ["tin"]
    readers = [threading.Thread(target=texts_of, args=(URL, tmp_path / "empty")) for _ in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert memory.reads == 3  # the others waited for the first


def test_an_unreachable_store_is_an_error_although_there_is_a_copy(
    memory: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert texts_of(f"{URL}/x.jsonl", tmp_path) == ["ore", "7"]

    def fail(self: MemoryClient, key: str) -> None:
        raise RemoteError("the store does not answer", url=URL)

    monkeypatch.setattr(MemoryClient, "head", fail)
    with pytest.raises(RemoteError, match=r"does not answer\. An earlier start has copied it") as caught:
        texts_of(f"{URL}/x.jsonl", tmp_path)
    copy = str(caught.value).rpartition(" ")[2]
    assert texts_of(copy, tmp_path) == ["ore", "7"]


def test_nothing_half_is_kept(memory: MemoryStore, tmp_path: Path) -> None:
    def fail() -> None:
        raise RemoteError("cut", url=URL)

    def replace() -> None:
        memory.objects["data/x.jsonl"] = b'{"text": "new"}\n{"text": 7}\n'

    for happening, message in ((fail, "cut"), (replace, "was replaced while it was downloaded")):
        memory.on_read = happening
        with pytest.raises(DistrustError, match=message):
            texts_of(f"{URL}/x.jsonl", tmp_path)
        assert below(tmp_path) == []
    memory.on_read = lambda: None
    assert texts_of(f"{URL}/x.jsonl", tmp_path) == ["new", "7"]


def test_a_file_that_a_run_replaces_meanwhile_is_read_whole(memory: MemoryStore) -> None:
    content = memory.objects["data/x.jsonl"]
    memory.on_read = lambda: memory.objects.update({"data/x.jsonl": content * 2})
    with remote_copies.fetch_files(parse(URL, ""), "x.jsonl") as folder:
        assert (folder / "x.jsonl").read_bytes() == content


def test_a_folder_of_a_store_has_splits_as_a_local_one(memory: MemoryStore, tmp_path: Path) -> None:
    names = ("train/a.jsonl", "train/b.jsonl", "test.jsonl", "_drafts/train.jsonl", "notes.txt")
    memory.objects = {f"data/{name}": f'{{"text": "{name}"}}\n'.encode() for name in names}
    assert texts_of(URL, tmp_path) == ["train/a.jsonl", "train/b.jsonl"]
    assert texts_of(f"{URL}/", tmp_path, split="test") == ["test.jsonl"]
    assert len(below(tmp_path)) == 3  # only what is read is downloaded
    for name, reason in (
        (f"{URL}/test.jsonl", "is one file, and has no split validation"),
        (URL, "no file is of the split validation; give one of test, train"),
        ("s3://bucket/none", "no such object"),
    ):
        with pytest.raises(DataError, match=reason):
            texts_of(name, tmp_path, split="validation")


@given(key=st.text(st.sampled_from("./\\~-a\n\0") | st.characters(codec="utf-8"), min_size=1, max_size=30))
def test_no_name_in_a_store_leads_out_of_the_cache(
    key: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = MemoryStore({f"data/{key}.jsonl": b'{"text": "ore"}\n'})
    folder = tmp_path_factory.mktemp("hostile")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote_copies, "connect", store.connect)
        try:
            texts_of(f"{URL}/", folder / "cache")
        except DataError:  # a hidden one
            assert below(folder) == []
        else:
            assert len(below(folder / "cache/data-1")) == len(below(folder)) == 1


def test_names_that_no_store_has_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, advice in (
        ("hf://datasets/a/b", "named OWNER/NAME, without hf://"),
        ("https://host/x.jsonl", "a URL begins with s3://, gs://, az://"),
        ("s3:/bucket/x", "give s3://BUCKET/NAME"),
    ):
        assert main(["weigh", name]) == 2
        assert advice in capsys.readouterr().err
