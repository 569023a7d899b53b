"""Checkpoints in a store: read by ranges, downloaded and verified; what is damaged or hostile is refused."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("obstore", reason="needs the extra [remote]")

from distrust import (
    Checkpoint,
    CheckpointManager,
    CheckpointNotFound,
    CorruptCheckpoint,
    DamagedCheckpointWarning,
    NoIntactCheckpoint,
    SaveFailed,
)
from distrust.checkpoint.disk import Disk
from distrust.checkpoint.remote import fetch
from distrust.checkpoint.remote.client import ObjectInfo, connect
from distrust.checkpoint.remote.line import object_name, parse_key
from distrust.checkpoint.remote.location import parse
from distrust.checkpoint.remote.remote_run import RemoteRun


class Store:
    """A client that counts its requests, and may answer wrongly."""

    def __init__(self, folder: Path) -> None:
        self.location = parse(folder, "folder")
        self.client = connect(self.location)
        self.calls = Counter()
        self.listing: list[ObjectInfo] = []  # what is listed beside the objects that exist
        self.changed = {}  # what a read gives in place of an object's bytes

    def __getattr__(self, name):
        def call(*arguments):
            self.calls[name] += 1
            return getattr(self.client, name)(*arguments)

        return call

    def list(self, prefix=""):
        self.calls["list"] += 1
        return [*self.client.list(prefix), *self.listing]

    def head(self, key):
        self.calls["head"] += 1
        return next((info for info in self.listing if info.key == key), None) or self.client.head(key)

    def read(self, key, begin, end):
        self.calls["read"] += 1
        if key in self.changed:
            return memoryview(self.changed[key][begin:end])
        return self.client.read(key, begin, end)


def state(step: int, *, tensors: int = 3, items: int = 3000) -> Checkpoint:
    numbers = np.random.default_rng(step)
    model = {f"layer.{index}": numbers.random(items) for index in range(tensors)}
    return Checkpoint(
        step=step, model=model, optimizer={"empty": np.zeros((0, 3))}, metrics={"eval_loss": step}
    )


@pytest.fixture
def run(tmp_path):
    """The folder of a run with the steps 1, 2 and 3, the last one final."""
    with CheckpointManager(tmp_path / "run" / "checkpoints", keep_last=None) as manager:
        for step in (1, 2):
            manager.save(state(step))
        manager.save(state(3), final=True)
    return tmp_path / "run"


def fetch_newest(store: Store, folder: Path) -> Path:
    remote = RemoteRun(store.location, store)
    return remote.fetch(remote.require_files()[::-1], folder)[1]


def damage(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_a_download_is_the_file_byte_for_byte(run, tmp_path):
    store = Store(run)
    remote = RemoteRun(store.location, store)
    for file in remote.files():
        name = file.key.rpartition("/")[2]
        assert remote.fetch([file], tmp_path / "local") == (file, tmp_path / "local" / name)
        assert (tmp_path / "local" / name).read_bytes() == (run / file.key).read_bytes()
    store.calls.clear()
    fetch_newest(store, tmp_path / "local")
    assert store.calls == {"list": 1, "read": 1}, "what is there and intact is not read again"


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(0, 3 * 4096), max_size=6), unit=st.sampled_from([4096, 8192]))
def test_any_layout_is_streamed_in_order(tmp_path, sizes, unit):
    shutil.rmtree(tmp_path / "any", ignore_errors=True)
    model = {f"{index}": np.arange(size, dtype=np.uint8) for index, size in enumerate(sizes)}
    with CheckpointManager(tmp_path / "any") as manager:
        path = manager.save(Checkpoint(step=1, model=model))
    store = Store(tmp_path / "any")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch, "RANGE_BYTES", unit)  # many ranges, and every slot is used again
        fetched = fetch_newest(store, tmp_path / "any" / "fetched")
    assert fetched.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("begin", "end"), [(0, 0), (5, 5), (0, 8), (3, 7), (3, 8), (3, 9), (8, 41), (13, 200)]
)
def test_ranges_begin_where_a_store_has_its_pieces(monkeypatch, begin, end):
    monkeypatch.setattr(fetch, "RANGE_BYTES", 8)
    content, requests = bytes(range(200)), []

    def read(first, last):
        requests.append((first, last))
        return memoryview(content)[first:last]

    arrived = list(fetch.blocks(read, begin, end))
    assert b"".join(block for _, block in arrived) == content[begin:end]
    assert [offset for offset, _ in arrived] == [first for first, _ in sorted(requests)]
    assert all(first < last and first // 8 == (last - 1) // 8 for first, last in requests), "one piece each"
    assert next(fetch.blocks(read, 0, 1 << 62)) == (0, content[:8]), (
        "a size that a store states takes no memory"
    )


def test_the_header_of_many_tensors_takes_two_reads(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        manager.save(state(1, tensors=1600, items=1))
    store = Store(tmp_path)
    run = RemoteRun(store.location, store)
    assert len(run.newest().tensors) == 1601
    assert store.calls == {"list": 1, "read": 2}


def test_a_listing_reads_each_header_once(run):
    store = Store(run)
    contents = RemoteRun(store.location, store).scan()
    assert [(file.step, file.kind) for file in contents.files] == [
        (1, "periodic"), (2, "periodic"), (3, "final"),
    ]  # fmt: skip
    assert store.calls == {"list": 1, "read": 3}


def test_a_hundred_checkpoints_take_a_hundred_and_one_requests(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        path = manager.save(state(1))
    for step in range(2, 101):
        shutil.copyfile(path, path.with_name(f"checkpoint-{step}.safetensors"))
    store = Store(tmp_path)
    contents = RemoteRun(store.location, store).scan()
    assert (len(contents.files), len(contents.damaged)) == (1, 99), "the others state another step"
    assert store.calls == {"list": 1, "read": 100}


def test_what_a_killed_download_left_is_removed(run, tmp_path):
    stale = tmp_path / "local" / ".checkpoint-2.safetensors.0123456789abcdef.tmp"
    stale.parent.mkdir()
    stale.write_bytes(b"half")
    os.utime(stale, (0, 0))
    assert fetch_newest(Store(run), stale.parent).exists()
    assert not stale.exists()


def test_a_flipped_byte_names_the_tensor_and_nothing_appears(run, tmp_path):
    path = run / "checkpoints" / "checkpoint-2.safetensors"
    damage(path, path.stat().st_size - 3)
    store = Store(run)
    target = tmp_path / "local"
    file = parse_key(store.client.head("checkpoints/checkpoint-2.safetensors"))
    with pytest.raises(
        NoIntactCheckpoint, match=r"checkpoint-2.safetensors: tensor model.layer.2 is damaged"
    ):
        RemoteRun(store.location, store).fetch([file], target)
    assert list(target.iterdir()) == []
    with pytest.raises(CorruptCheckpoint) as caught:
        fetch.verify(store, file)
    assert (caught.value.tensor, caught.value.path) == ("model.layer.2", path)


def test_the_newest_damaged_falls_back_to_the_one_before_it(run, tmp_path):
    path = run / "checkpoints" / "checkpoint-3-final.safetensors"
    damage(path, path.stat().st_size - 3)
    store = Store(run)
    with pytest.warns(DamagedCheckpointWarning, match="checkpoint-3-final.safetensors: tensor model.layer.2"):
        path = fetch_newest(store, tmp_path / "local")
    assert path.name == "checkpoint-2.safetensors"


def test_a_disk_that_fails_leaves_nothing(tmp_path):
    class Failing(Disk):
        def write(self, descriptor, view, offset):
            if offset > 8 << 20:
                raise OSError(errno.EIO, "the disk fails")
            super().write(descriptor, view, offset)

    with CheckpointManager(tmp_path / "run") as manager:
        manager.save(state(1, items=1 << 20))
    store, threads = Store(tmp_path / "run"), threading.active_count()
    file = parse_key(store.client.head("checkpoint-1.safetensors"))
    with pytest.raises(SaveFailed, match="the disk fails"):
        RemoteRun(store.location, store).fetch([file], tmp_path / "local", Failing())
    assert (list((tmp_path / "local").iterdir()), threading.active_count()) == ([], threads)


@pytest.mark.parametrize("cut", [0, 5, 1000, 5000, 60_000])
def test_an_object_that_is_cut_while_it_is_read_is_damaged(run, tmp_path, cut):
    key = "checkpoints/checkpoint-2.safetensors"
    store = Store(run)
    store.changed[key] = (run / key).read_bytes()[:cut]
    file = parse_key(store.client.head(key))
    for read in (fetch.verify, lambda *given: fetch.fetch(*given, tmp_path / "local", Disk())):
        with pytest.raises(CorruptCheckpoint, match=r"checkpoint-2.safetensors: .*truncated"):
            read(store, file)
    assert not (tmp_path / "local").exists()


def test_what_was_damaged_on_its_way_is_read_again(run, tmp_path):
    class Flipping(Store):
        def read(self, key, begin, end):
            content = bytearray(super().read(key, begin, end))
            if self.calls["read"] == 2:
                content[-1] ^= 1
            return memoryview(content)

    path = fetch_newest(Flipping(run), tmp_path / "local")  # and not the checkpoint before it
    assert path.read_bytes() == (run / "checkpoints" / path.name).read_bytes()
    assert path.name == "checkpoint-3-final.safetensors"


def test_an_object_that_is_replaced_while_it_is_read_is_not_mixed(run, tmp_path):
    key = "checkpoints/checkpoint-2.safetensors"

    class Replaced(Store):
        def read(self, key, begin, end):
            content = super().read(key, begin, end)
            shutil.copyfile(run / "checkpoints" / "checkpoint-1.safetensors", run / key)
            return content

    store = Replaced(run)
    with pytest.raises(CorruptCheckpoint, match="not what its name says"):  # read again, as it is now
        fetch.verify(store, parse_key(store.client.head(key)))


def test_another_state_under_the_name_of_one_is_damaged(run, tmp_path):
    folder = run / "checkpoints"
    digest = RemoteRun(parse(run, "run")).newest().state_digest
    for name in (object_name(3, "final", 7, "0" * 64), object_name(2, "final", 7, digest)):
        shutil.copyfile(folder / "checkpoint-3-final.safetensors", folder / name)
    shutil.copyfile(folder / "checkpoint-3-final.safetensors", folder / object_name(3, "final", 8, digest))
    contents = RemoteRun(parse(run, "run")).scan()
    assert [file.step for file in contents.files] == [1, 2, 3, 3]
    assert [file.step for file in contents.damaged] == [2, 3]
    assert all("not what its name says" in file.reason for file in contents.damaged)


def test_hostile_names_and_sizes_are_no_checkpoints(run, tmp_path):
    store = Store(run)
    for name in (
        "../checkpoint-9.safetensors",
        "checkpoint-9.safetensors\n",
        "a/../../checkpoint-9.safetensors",
        "checkpoint-９.safetensors",
        "checkpoint-99999999999999999999.safetensors",
        "checkpoint-9.safetensors/../x",
        "checkpoint-09.safetensors",
        "checkpoint-9.0-0123456789abcdef.safetensors",
    ):
        store.listing.append(ObjectInfo(f"checkpoints/{name}", 1000, "x"))
    store.listing.append(ObjectInfo("checkpoints/checkpoint-9.safetensors", 2**70, "x"))
    store.listing.append(ObjectInfo("checkpoints/checkpoint-8.safetensors", 2**62, "x"))  # does not exist
    remote = RemoteRun(store.location, store)
    assert [file.step for file in remote.scan().files] == [1, 2, 3]
    with pytest.warns(DamagedCheckpointWarning, match="checkpoint-8.safetensors: no such checkpoint"):
        assert fetch_newest(store, tmp_path / "local").name == "checkpoint-3-final.safetensors"
    store.changed["checkpoints/checkpoint-8.safetensors"] = (2**40).to_bytes(8, "little") + b"{" * 300_000
    with pytest.warns(DamagedCheckpointWarning, match="not a checkpoint, or truncated"):
        assert fetch_newest(store, tmp_path / "local").name == "checkpoint-3-final.safetensors"


def test_what_does_not_exist_is_named(run, tmp_path):
    with pytest.raises(CheckpointNotFound, match="no checkpoints here"):
        RemoteRun(parse(tmp_path / "empty", "x")).newest()
    with pytest.raises(CheckpointNotFound, match=r"checkpoint-9.safetensors: no such checkpoint"):
        RemoteRun(parse(run / "checkpoints" / "checkpoint-9.safetensors", "x")).newest()
