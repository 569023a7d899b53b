"""Mapped loads: views of the file instead of copies, writable, optionally verified on first access."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from states import FRAMEWORKS

from distrust import Checkpoint, CheckpointManager
from distrust.checkpoint import verified_read
from distrust.errors import ConfigError, CorruptCheckpoint

NESTED = {
    "w": np.arange(6.0),
    "list": [np.arange(2), {"deep": np.arange(3)}, (np.arange(4), [np.arange(5), "text"])],
    "scalar": 1.5,
    "none": None,
    "inner": {0: np.arange(7), "empty": {}},
}


@pytest.fixture
def manager(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        yield manager


@pytest.fixture
def lazy(manager) -> Checkpoint:
    """A nested state, loaded lazily."""
    manager.save(Checkpoint(step=1, model=NESTED, optimizer={"m": np.arange(8)}))
    return manager.load(1, mmap=True, verify="lazy")


def to_plain(value: Any) -> Any:
    """Convert arrays to lists and mappings to dicts, which compare by ``==``."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(to_plain, value))
    return value


def damage(manager: CheckpointManager, path: Path, name: str) -> None:
    tensor = next(tensor for tensor in manager.inspect(path).tensors if tensor.name == name)
    raw = bytearray(path.read_bytes())
    raw[tensor.offset + tensor.nbytes - 1] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("verify", ["full", "lazy"])
def test_writes_to_mapped_arrays_stay_in_memory(manager, framework, verify):
    path = manager.save(Checkpoint(step=1, model={"w": np.arange(5000)}))
    raw = path.read_bytes()

    loaded = manager.load(1, framework=framework, mmap=True, verify=verify)
    loaded.model["w"][:] = 7

    assert (loaded.model["w"] == 7).all()
    assert path.read_bytes() == raw
    assert (manager.load(1).model["w"] == np.arange(5000)).all()
    manager.validate(1)


def test_mapped_file_can_be_replaced_and_removed(manager):
    path = manager.save(Checkpoint(step=1, model={"w": np.full(5000, 1)}))
    loaded = manager.load(1, mmap=True, verify="lazy")
    manager.save(Checkpoint(step=1, model={"w": np.full(5000, 2)}))
    path.unlink()
    assert (loaded.model["w"] == 1).all()


def test_lazy_requires_mmap(manager):
    manager.save(Checkpoint(step=1))
    with pytest.raises(ConfigError, match="mmap=True"):
        manager.load(1, verify="lazy")


def test_unknown_verify_option_is_rejected(manager):
    manager.save(Checkpoint(step=1))
    with pytest.raises(ConfigError, match="lasy"):
        manager.load(1, mmap=True, verify="lasy")


def test_lazy_state_behaves_like_a_dict(lazy):
    assert len(lazy.model) == len(NESTED)
    assert sorted(lazy.model) == sorted(NESTED)
    assert "w" in lazy.model
    assert "v" not in lazy.model
    assert lazy.model.get("v") is None
    with pytest.raises(KeyError):
        lazy.model["v"]
    assert to_plain(lazy.model) == to_plain(NESTED)
    assert type(lazy.model["list"][2]) is tuple
    assert lazy.model["w"] is lazy.model["w"]
    assert lazy.model["inner"] == lazy.model["inner"]
    assert lazy.model == lazy.model.copy()
    assert lazy.model != lazy.optimizer
    assert lazy.model["inner"]["empty"] == {}
    assert (lazy.rng, lazy.history) == ({}, {})


@pytest.mark.parametrize("copy", [dict, lambda state: state.copy()], ids=["dict()", "copy()"])
def test_copy_of_a_lazy_state_is_a_plain_dict(lazy, copy):
    copied = copy(lazy.model)
    assert type(copied) is dict
    assert to_plain(copied) == to_plain(NESTED)
    copied["w"] = 0
    assert (lazy.model["w"] == NESTED["w"]).all()


def test_copy_method_returns_plain_dicts_at_every_level(lazy):
    """torch optimizers modify a copy of the state that they load."""

    def is_plain(value: Any) -> bool:
        if isinstance(value, Mapping):
            return type(value) is dict and all(map(is_plain, value.values()))
        return all(map(is_plain, value)) if isinstance(value, (list, tuple)) else True

    assert is_plain(lazy.model.copy())


def test_each_tensor_is_verified_once_on_first_access(manager, monkeypatch):
    manager.save(Checkpoint(step=1, model=NESTED, history={"loss": np.arange(9)}))
    names = []
    original = verified_read.verify

    def record(tensors, read_piece) -> None:
        names.extend(tensor.name for tensor in tensors)
        original(tensors, read_piece)

    monkeypatch.setattr(verified_read, "verify", record)
    lazy = manager.load(1, mmap=True, verify="lazy")
    assert (len(lazy.model), repr(lazy.model), lazy.model["scalar"]) == (5, repr(lazy.model), 1.5)
    assert names == []
    for _ in range(2):
        assert lazy.model["w"].sum() == 15
        assert lazy.model["inner"][0].sum() == 21
    assert names == ["model.w", "model.inner.0"]
    assert lazy.model["list"][1]["deep"].sum() == 3
    assert "history.loss" not in names


def test_damaged_tensor_raises_on_access_and_intact_ones_are_usable(manager):
    path = manager.save(Checkpoint(step=1, model=NESTED, optimizer={"m": np.arange(8)}))
    damage(manager, path, "model.inner.0")

    lazy = manager.load(1, mmap=True, verify="lazy")

    inner = lazy.model["inner"]
    assert (lazy.model["w"] == NESTED["w"]).all()
    assert (lazy.optimizer["m"] == np.arange(8)).all()
    for access in (
        lambda: inner[0],
        lambda: dict(inner),
        lambda: lazy.model.copy(),
        lambda: manager.save(Checkpoint(step=2, model=lazy.model)),
    ):
        with pytest.raises(CorruptCheckpoint, match=r"model\.inner\.0 is damaged") as caught:
            access()
        assert (caught.value.path, caught.value.tensor) == (path, "model.inner.0")
    assert manager.list_checkpoints() == [1]


def test_damaged_header_is_detected_at_once(manager):
    path = manager.save(Checkpoint(step=1, model=NESTED))
    raw = bytearray(path.read_bytes())
    raw[300] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CorruptCheckpoint):
        manager.load(1, mmap=True, verify="lazy")


@pytest.mark.parametrize("save", ["save", "save_async"])
def test_lazy_state_saved_again_has_the_same_digest(manager, lazy, save):
    first = manager.inspect(1).state_digest

    getattr(manager, save)(lazy)  # replaces the file that it is a view of
    manager.close()

    assert manager.inspect(1).state_digest == first
    assert to_plain(manager.load(1).model) == to_plain(NESTED)


def test_torch_resumes_from_a_lazy_state(manager):
    torch = pytest.importorskip("torch")
    torch.manual_seed(1)
    model, resumed = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    resumed_optimizer = torch.optim.AdamW(resumed.parameters())

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.ones(2, 5)).square().sum().backward()
        optimizer.step()

    step(model, optimizer)
    manager.save(Checkpoint(step=1, model=model.state_dict(), optimizer=optimizer.state_dict()))
    lazy = manager.load(1, framework="torch", mmap=True, verify="lazy")
    resumed.load_state_dict(lazy.model)
    resumed_optimizer.load_state_dict(lazy.optimizer)
    for _ in range(2):
        step(model, optimizer)
        step(resumed, resumed_optimizer)

    for expected, actual in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(expected, actual)
    manager.validate(1)  # the file is unchanged
