"""The file format: canonical, stable, readable by other programs, and every byte verified."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

from distrust import Checkpoint, CheckpointManager
from distrust.checkpoint.format import Layout
from distrust.checkpoint.tree import flatten
from distrust.errors import CorruptCheckpoint

#: BLAKE3 of the golden checkpoint. If it changes, existing files may not load any more: give the format a new
#: version, and keep a reader of this one.
GOLDEN = "c17c0d67723840435757d5b5755a8d14650058afec01d0ff9591d7379b91bf2a"

GOLDEN_ARRAYS = {
    "model": {
        "w": np.arange(6, dtype=np.float32).reshape(2, 3),
        "é": np.array([True, False]),
        "": np.array(7, np.int64),
    },
    "optimizer": {
        "state": {0: {"m": np.zeros((0, 2), np.float16)}, "0": {"m": np.array([1 + 2j], np.complex64)}}
    },
}
GOLDEN_PLAIN = {
    "rng": {},
    "history": {"loss": [(1.5, -0.0), None, True, 2**70]},
    "config": {"alpha": 2.7},
    "metadata": {"best_loss": math.inf, None: "ü\n", 0.1: math.nan},
}


def golden_bytes() -> bytes:
    sections, arrays = flatten(
        {**GOLDEN_ARRAYS, **GOLDEN_PLAIN}, is_array=lambda value: isinstance(value, np.ndarray)
    )
    names = {"float32": "F32", "bool": "BOOL", "int64": "I64", "float16": "F16", "complex64": "C64"}
    tensors = {name: (names[array.dtype.name], array.shape) for name, array in arrays.items()}
    run = '{"created":"2025-01-01T00:00:00.000+00:00","extra":{},"host":"golden","metrics":{"loss":0.5}}'
    layout = Layout(tensors, step=20, kind="final", sections=sections, run=run)
    data = [arrays[name].tobytes() for name in layout.names]
    header, _ = layout.header([blake3(part).hexdigest() for part in data])
    return header + b"".join(data)


def test_golden_bytes_do_not_change():
    assert blake3(golden_bytes()).hexdigest() == GOLDEN


def test_golden_checkpoint_loads(tmp_path):
    path = tmp_path / "checkpoint-20-final.safetensors"
    path.write_bytes(golden_bytes())
    manager = CheckpointManager(tmp_path)

    loaded = manager.load(20)
    manager.validate(20)

    assert loaded.model["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert loaded.model["é"].tolist() == [True, False]
    assert loaded.model[""] == 7
    assert loaded.optimizer["state"][0]["m"].shape == (0, 2)
    assert loaded.optimizer["state"]["0"]["m"].tolist() == [1 + 2j]
    assert loaded.history == GOLDEN_PLAIN["history"]
    assert loaded.config == {"alpha": 2.7}
    assert loaded.metadata["best_loss"] == math.inf
    assert loaded.metrics == {"loss": 0.5}
    (file,) = manager.scan().files
    assert (file.step, file.kind, file.created) == (20, "final", "2025-01-01T00:00:00.000+00:00")


def test_manager_writes_the_golden_bytes(tmp_path):
    """The manager's file differs from the golden one only in ``run`` and the digest that covers it."""
    with CheckpointManager(tmp_path) as manager:
        path = manager.save(Checkpoint(step=20, **GOLDEN_ARRAYS, **GOLDEN_PLAIN), final=True)

    def split(raw: bytes) -> tuple[dict, bytes]:
        end = 8 + int.from_bytes(raw[:8], "little")
        assert end % 4096 == 0
        return json.loads(raw[8:end]), raw[end:]

    header, data = split(path.read_bytes())
    golden_header, golden_data = split(golden_bytes())
    for parsed in (header, golden_header):
        del parsed["__metadata__"]["run"], parsed["__metadata__"]["digest"]
    assert header == golden_header
    assert data == golden_data


SAVE_SHUFFLED = """
import json, random, sys
import numpy as np
from blake3 import blake3
from distrust import Checkpoint, CheckpointManager

rng = random.Random(sys.argv[2])

def tree(depth):
    names = [0, "0", 1.5, None, True, "a", "a.b", "b", "é", ""]
    rng.shuffle(names)
    return {name: tree(depth - 1) if depth else np.full(3, len(repr(name)), np.float32) for name in names}

with CheckpointManager(sys.argv[1]) as manager:
    path = manager.save(Checkpoint(step=1, model=tree(2), metadata={name: 1 for name in tree(0)},
                                   metrics={"loss": float(sys.argv[2])}, run={"path": sys.argv[1]}))
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    metadata = json.loads(raw[8:end])["__metadata__"]
    same = [blake3(raw[end:]).hexdigest(), metadata["state"], metadata["digests"], metadata["state_digest"]]
    print(json.dumps([same, metadata["run"], manager.inspect(1).state_digest]))
"""


def test_equal_states_give_equal_files_except_run(tmp_path, start_python):
    """In different processes, with different hash seeds, orders of insertion and runs."""
    processes = [
        start_python(SAVE_SHUFFLED, tmp_path / str(seed), seed, PYTHONHASHSEED=str(seed)) for seed in range(3)
    ]
    results = []
    for process in processes:
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 0, stderr
        results.append(json.loads(stdout))

    same, runs, state_digests = zip(*results, strict=True)
    assert same[0] == same[1] == same[2]
    assert len(set(state_digests)) == 1
    assert len(set(runs)) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"w": np.zeros(2)}},
        {"model": {"w": -np.zeros(3)}},
        {"model": {"w": np.zeros(3, np.int64)}},
        {"model": {"w": np.zeros((3, 1))}},
        {"model": {"v": np.zeros(3)}},
        {"model": {"w": np.zeros(3), "v": np.zeros(0)}},
        {"model": {}, "optimizer": {"w": np.zeros(3)}},
        {"metadata": {"a": 2}},
        {"metadata": {"a": 1.0}},
        {"metadata": {"a": True}},
        {"metadata": {"a": (1,)}},
        {"config": {"a": 1}},
        {"step": 2},
    ],
    ids=str,
)
def test_state_digest_changes_with_the_state(tmp_path, change):
    base = {"step": 1, "model": {"w": np.zeros(3)}, "metadata": {"a": 1}}
    with CheckpointManager(tmp_path) as manager:
        digests = {
            store.inspect(store.save(Checkpoint(**content))).state_digest
            for store, content in [(manager, base), (manager, {**base, **change})]
        }
    assert len(digests) == 2


def test_safetensors_reads_the_file(tmp_path):
    ml_dtypes, torch = pytest.importorskip("ml_dtypes"), pytest.importorskip("torch")
    safe_open = pytest.importorskip("safetensors").safe_open
    rng = np.random.default_rng(1)
    model = {
        "f64": rng.normal(size=(3, 2)),
        "f32": rng.normal(size=5).astype(np.float32),
        "f16": np.ones((2, 2), np.float16),
        "i8": np.arange(-3, 3, dtype=np.int8),
        "u16": np.arange(7, dtype=np.uint16),
        "c64": np.array([1 + 2j], np.complex64),
        "bool": np.array([True, False]),
        "empty": np.zeros((2, 0, 3), np.float32),
        "scalar": np.array(3.5),
        "transposed": rng.normal(size=(3, 4)).T,
        "nested": {"é.x": np.arange(3)},
    }
    extended = {"bf16": np.arange(5).astype(ml_dtypes.bfloat16), "f8": np.ones(3, ml_dtypes.float8_e4m3fn)}
    with CheckpointManager(tmp_path) as manager:
        path = manager.save(Checkpoint(step=1, model=model))
        extended_path = manager.save(Checkpoint(step=2, model={**model, **extended}))
        names = [tensor.name for tensor in manager.inspect(1).tensors]

    expected = {f"model.{name}": array for name, array in model.items() if name != "nested"}
    expected["model.nested.é.x"] = model["nested"]["é.x"]
    with safe_open(path, framework="np") as opened:
        assert sorted(opened.keys()) == sorted(expected) == sorted(names)
        assert opened.metadata()["format"] == "distrust"
        for name, array in expected.items():
            read = opened.get_tensor(name)
            assert (name, read.dtype, read.shape) == (name, array.dtype, array.shape)
            np.testing.assert_array_equal(read, array)
    with safe_open(extended_path, framework="pt") as opened:
        for name, array in expected.items():
            assert torch.equal(opened.get_tensor(name), torch.from_numpy(np.array(array))), name
        assert opened.get_tensor("model.bf16").tolist() == [0, 1, 2, 3, 4]
        assert opened.get_tensor("model.f8").tolist() == [1, 1, 1]


def test_tensors_are_aligned_to_their_item_size_and_the_data_to_pages(tmp_path):
    model = {f"{index:02}": np.zeros(3, dtype) for index, dtype in enumerate("?bBhHeiIfqQdF" * 2)}
    with CheckpointManager(tmp_path) as manager:
        manager.save(Checkpoint(step=1, model=model))
        file = manager.inspect(1)

    position = file.tensors[0].offset
    assert position % 4096 == 0
    for tensor in file.tensors:
        assert tensor.offset == position
        assert tensor.offset % (tensor.nbytes // 3) == 0
        position += tensor.nbytes
    assert position == file.bytes == file.path.stat().st_size


@pytest.fixture
def small(tmp_path) -> tuple[CheckpointManager, Path, bytes]:
    with CheckpointManager(tmp_path) as manager:
        model = {"w": np.arange(5, dtype=np.float32), "b": np.array([True]), "e": np.zeros(0)}
        path = manager.save(Checkpoint(step=1, model=model, metadata={"note": "é"}))
    return manager, path, path.read_bytes()


def detects_damage(manager: CheckpointManager, path: Path) -> bool:
    """Return whether both validate and load raise, naming the file in one line."""
    for read in (manager.validate, manager.load):
        try:
            read(path)
        except CorruptCheckpoint as error:
            if error.path != path or str(path) not in str(error) or "\n" in str(error):
                return False
        else:
            return False
    return True


def test_every_flipped_bit_is_detected(small):
    manager, path, raw = small
    assert not detects_damage(manager, path)
    undetected = []
    with path.open("r+b", buffering=0) as file:
        for position, byte in enumerate(raw):
            file.seek(position)
            file.write(bytes([byte ^ (1 << position % 8)]))
            if not detects_damage(manager, path):
                undetected.append(position)
            file.seek(position)
            file.write(bytes([byte]))
    assert undetected == []
    assert not detects_damage(manager, path)


def test_every_truncation_is_detected(small):
    manager, path, raw = small
    undetected = []
    for length in reversed(range(len(raw))):
        with path.open("r+b") as file:
            file.truncate(length)
        if not detects_damage(manager, path):
            undetected.append(length)
    assert undetected == []


@pytest.mark.parametrize("tail", [b"\0", b" ", b"x", b"\0" * 4096, b"\0" * (1 << 20)], ids=len)
def test_trailing_bytes_are_detected(small, tail):
    manager, path, raw = small
    path.write_bytes(raw + tail)
    assert detects_damage(manager, path)


def test_zeros_instead_of_data_are_detected(small):
    """A crash leaves these if the file size reached the disk and the data did not."""
    manager, path, raw = small
    data_offset = manager.inspect(1).tensors[0].offset
    for begin in (0, 4096, data_offset):
        path.write_bytes(raw[:begin] + b"\0" * (len(raw) - begin))
        assert detects_damage(manager, path)


def test_error_names_the_damaged_tensor_and_its_byte_range(small):
    manager, path, raw = small
    tensor = next(tensor for tensor in manager.inspect(1).tensors if tensor.name == "model.w")
    damaged = bytearray(raw)
    damaged[tensor.offset + 3] ^= 1
    path.write_bytes(damaged)

    for read in (manager.validate, manager.load):
        with pytest.raises(
            CorruptCheckpoint, match=rf"model\.w .*{tensor.offset} to {tensor.offset + 20}"
        ) as caught:
            read(1)
        assert caught.value.tensor == "model.w"
    assert manager.inspect(1).step == 1  # the header has a digest of its own
