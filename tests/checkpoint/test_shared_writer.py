"""One file that several ranks write together: threads are the ranks here."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from campaigns.power.thread_ranks import ThreadPeers, ThreadWorld
from distrust import Checkpoint, CheckpointManager
from distrust.checkpoint import arrays, shared_writer, stream_writer
from distrust.checkpoint.arrays import Shard, rows_of
from distrust.checkpoint.disk import Disk
from distrust.errors import CheckpointError, SaveFailed, UnsupportedState

DTYPES = [np.uint8, np.float16, np.float32, np.float64]
Arrays = dict[str, np.ndarray]


def state(arrays: Arrays, *, step: int = 3, **others) -> Checkpoint:
    return Checkpoint(
        step=step,
        model=arrays,
        optimizer={"lr": 0.1, "step": np.float32(step)},
        rng={"generator": np.arange(5, dtype=np.uint8)},
        metadata={"tokens_seen": 7},
        **others,
    )


def share_of(arrays: Arrays, peers: ThreadPeers) -> dict[str, Shard]:
    shards = {}
    for name, array in arrays.items():
        rows = rows_of(peers.index, rows=len(array), count=peers.count)
        shards[name] = Shard(array[rows.start : rows.stop], array.shape)
    return shards


def save(peers: ThreadPeers, directory: Path, arrays: Arrays, *, disk: Disk | None = None, step: int = 3):
    """Save on one rank; what differs by rank alone must not matter."""
    with CheckpointManager(directory, disk=disk) as manager:
        manager.share(peers)
        checkpoint = state(share_of(arrays, peers), step=step, run={"elapsed": 10.0**peers.index})
        pending = manager.save_async(checkpoint, overlap=True)
        pending.wait_copied()
        return pending.wait()


def save_alone(directory: Path, arrays: Arrays) -> str:
    with CheckpointManager(directory) as manager:
        return manager.inspect(manager.save(state(arrays))).state_digest


def make_arrays(shapes: list[tuple[int, ...]], dtypes: list[type]) -> Arrays:
    return {
        f"w{number}": np.arange(np.prod(shape, dtype=int), dtype=np.int64).reshape(shape).astype(dtype)
        for number, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    }


shapes = st.lists(
    st.sampled_from([(0, 3), (1,), (2, 1), (5,), (3, 700), (257, 9), (1500,), (2, 3, 5)]), max_size=7
)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 5), shapes, st.data())
def test_the_file_is_that_of_one_writer_on_any_number_of_ranks(count, shapes, data):
    arrays = make_arrays(shapes, [data.draw(st.sampled_from(DTYPES)) for _ in shapes])
    block_bytes = data.draw(st.sampled_from([4096, 8192, 4 << 20]))
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream_writer, "BLOCK_BYTES", block_bytes)
        shared, alone = Path(folder) / "shared", Path(folder) / "alone"
        results = ThreadWorld(count).run(lambda peers: save(peers, shared, arrays))
        assert results == [shared / "checkpoint-3.safetensors"] * count
        manager = CheckpointManager(shared)
        manager.validate(3)
        assert manager.inspect(3).state_digest == save_alone(alone, arrays)
        loaded = manager.load(3)
        assert all(np.array_equal(loaded.model[name], array) for name, array in arrays.items())
        assert {path.name for path in shared.iterdir()} == {".lock", "checkpoint-3.safetensors"}


LARGE = make_arrays([(300, 100), (7,), (100, 33), (200, 50)], [np.float32] * 4)  # 160 KB


def test_a_rank_gets_no_more_than_a_block_of_each_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(stream_writer, "BLOCK_BYTES", 64 << 10)
    ranks: list[ThreadPeers] = []

    def work(peers):
        ranks.append(peers)
        return save(peers, tmp_path, make_arrays([(1000, 50)] * 8, [np.float32] * 8))

    ThreadWorld(4).run(work)
    assert max(max(peers.blocks) for peers in ranks) <= 64 << 10
    received = [sum(peers.blocks) for peers in ranks]
    assert max(received) - min(received) <= 8192, received  # pages, and the arrays that are not divided


def test_without_memory_for_a_copy_a_rank_writes_from_the_arrays(tmp_path, monkeypatch):
    monkeypatch.setattr("distrust.checkpoint.snapshot.available_bytes", lambda: 1 << 10)
    with pytest.warns(match="saved synchronously"):
        ThreadWorld(3).run(lambda peers: save(peers, tmp_path / "shared", LARGE))
    digest = CheckpointManager(tmp_path / "shared").inspect(3).state_digest
    monkeypatch.undo()
    assert digest == save_alone(tmp_path / "alone", LARGE)


class FailingDisk(Disk):
    """Fails, or waits for a word, at one call."""

    def __init__(self, call: str, fail: Callable[[], None]) -> None:
        original = getattr(self, call)

        def fail_or_call(*arguments):
            fail()
            return original(*arguments)

        setattr(self, call, fail_or_call)


def no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("rank", "call"),
    [
        (0, "create"),
        (0, "reserve"),
        (0, "write"),
        (0, "sync"),
        (0, "rename"),
        (1, "join"),
        (2, "write"),
        (2, "sync"),
    ],
)
def test_if_a_rank_fails_the_save_has_failed_on_all_and_the_next_one_works(tmp_path, rank, call):
    ThreadWorld(3).run(lambda peers: save(peers, tmp_path, LARGE))
    digest = CheckpointManager(tmp_path).inspect(3).digest

    def work(peers):
        disk = Disk() if peers.index != rank else FailingDisk(call, no_space)
        with CheckpointManager(tmp_path, disk=disk) as manager:
            manager.share(peers)
            with pytest.raises(SaveFailed, match="not saved: No space left") as failure:
                manager.save_async(state(share_of(LARGE, peers))).wait()
            disk.__dict__.clear()
            saved = manager.save_async(state(share_of(LARGE, peers), step=4)).wait()
            return str(failure.value), saved

    results = ThreadWorld(3).run(work)
    assert {saved for _, saved in results} == {tmp_path / "checkpoint-4.safetensors"}, results
    texts = [text.removeprefix(f"rank {rank}: ") for text, _ in results]
    assert len(set(texts)) == 1
    manager = CheckpointManager(tmp_path)
    assert manager.inspect(3).digest == digest
    manager.validate(4)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("phase", ["copy", "rounds"])
@pytest.mark.parametrize("rank", [0, 2])
def test_an_error_anywhere_on_one_rank_ends_the_save_on_all_and_the_next_one_works(
    tmp_path, monkeypatch, rank, phase
):
    failing, fill = set[int](), arrays.fill
    error = SaveFailed("changed", path=tmp_path) if phase == "copy" else MemoryError("no memory")

    def fill_or_fail(memory, offset, flats):
        if threading.get_ident() in failing:
            failing.clear()
            raise error
        return fill(memory, offset, flats)

    monkeypatch.setattr(arrays, "fill", fill_or_fail)

    def work(peers):
        with CheckpointManager(tmp_path) as manager:
            manager.share(peers)
            start_copy = manager._state.snapshot.start_copy

            def fail_copy(*arguments, **options):
                def fail(path):
                    raise error

                return start_copy(*arguments, **options)._replace(copy=fail)

            if peers.index == rank and phase == "copy":
                manager._state.snapshot.start_copy = fail_copy
            elif peers.index == rank:
                failing.add(threading.get_ident())
            with pytest.raises(SaveFailed, match=str(error)):
                (manager.save_async if phase == "copy" else manager.save)(
                    state(share_of(LARGE, peers))
                ).wait()
            return manager.save(state(share_of(LARGE, peers), step=4))

    assert ThreadWorld(3).run(work) == [tmp_path / "checkpoint-4.safetensors"] * 3
    CheckpointManager(tmp_path).validate(4)


@pytest.mark.parametrize("rank", range(3))
@pytest.mark.parametrize("word", range(3))
def test_if_a_rank_is_lost_at_any_word_nothing_is_committed_unless_all_is_durable(tmp_path, rank, word):
    ThreadWorld(3).run(lambda peers: save(peers, tmp_path, LARGE))
    digest = CheckpointManager(tmp_path).inspect(3).digest

    class Lost(BaseException):
        pass

    def work(peers):
        if peers.index == rank:
            tell, words = peers.tell, iter(range(9))

            def die(value):
                if next(words) == word:
                    raise Lost
                return tell(value)

            peers.tell = die
            with pytest.raises(Lost):
                save(peers, tmp_path, LARGE, step=4)
            raise Lost
        return save(peers, tmp_path, LARGE, step=4)

    results = ThreadWorld(3).run(work)
    manager = CheckpointManager(tmp_path)
    assert manager.inspect(3).digest == digest
    committed = 4 in manager.list_checkpoints()
    assert committed == (word == 2)  # the last word only says that it was
    if committed:
        manager.validate(4)
    for index, result in enumerate(results):
        saved = index == 0 and committed
        assert isinstance(result, Lost if index == rank else Path if saved else SaveFailed), results
    with manager:
        manager.acquire()
    assert not list(tmp_path.glob("*.tmp"))


def test_ranks_with_other_arrays_or_at_another_step_save_nothing(tmp_path):
    for differing in ({"arrays": {**LARGE, "more": np.ones(3)}}, {"step": 9}):

        def work(peers, differing=differing):
            options = {"arrays": LARGE, **(differing if peers.index == 2 else {})}
            return save(peers, tmp_path, **options)

        for result in ThreadWorld(3).run(work):
            assert isinstance(result, SaveFailed)
            assert "rank 2 has other arrays, or is at another step" in str(result)
    assert not CheckpointManager(tmp_path).list_checkpoints()


def test_the_folder_must_be_one_that_all_ranks_see(tmp_path):
    results = ThreadWorld(2).run(lambda peers: save(peers, tmp_path / str(peers.index), LARGE))
    assert all(isinstance(result, SaveFailed) for result in results)
    assert "No such file or directory" in str(results[0])


def test_a_shard_is_never_saved_as_if_it_were_the_array(tmp_path):
    half = Shard(np.ones((2, 3)), (4, 3))
    with (
        CheckpointManager(tmp_path) as manager,
        pytest.raises(UnsupportedState, match=r"model\.w: is one rank's shard"),
    ):
        manager.save(Checkpoint(step=1, model={"w": half}))

    def work(peers):
        with CheckpointManager(tmp_path) as manager:
            manager.share(peers)
            manager.save(Checkpoint(step=1, model={"w": Shard(np.ones((1 + peers.index, 3)), (4, 3))}))

    assert all(isinstance(result, CheckpointError) for result in ThreadWorld(2).run(work))
    assert not CheckpointManager(tmp_path).list_checkpoints()


def test_the_leader_commits_only_when_every_part_is_durable(tmp_path):
    synced, order = threading.Event(), list[str]()

    def wait_to_sync():
        synced.wait(0.2)
        order.append("sync of rank 2")

    def work(peers):
        disk = {
            0: FailingDisk("rename", lambda: order.append("rename")),
            2: FailingDisk("sync", wait_to_sync),
        }.get(peers.index, Disk())
        return save(peers, tmp_path, LARGE, disk=disk)

    ThreadWorld(3).run(work)
    assert order == ["sync of rank 2", "rename"]


def test_the_memory_of_a_round_is_bounded_for_any_number_of_ranks():
    assert shared_writer.ROUND_BYTES + 3 * stream_writer.BLOCK_BYTES <= 64 << 20
