"""Views of the file in place of copies: writable, lazily verified, and as good as what was saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from states import FRAMEWORKS, needs_torch, torch

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


def plain(value: Any) -> Any:
    """What compares by ``==``."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value))
    return value


def damage(manager: CheckpointManager, path: Path, name: str) -> None:
    tensor = next(tensor for tensor in manager.inspect(path).tensors if tensor.name == name)
    raw = bytearray(path.read_bytes())
    raw[tensor.offset + tensor.nbytes - 1] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("verify", ["full", "lazy"])
def test_what_is_written_to_mapped_arrays_stays_in_memory(manager, framework, verify):
    path = manager.save(Checkpoint(step=1, model={"w": np.arange(5000)}))
    before = path.read_bytes()

    loaded = manager.load(1, framework=framework, mmap=True, verify=verify)
    loaded.model["w"][:] = 7

    assert (loaded.model["w"] == 7).all()
    assert path.read_bytes() == before
    assert (manager.load(1).model["w"] == np.arange(5000)).all()
    manager.validate(1)


def test_a_mapped_file_may_be_replaced_and_removed(manager):
    path = manager.save(Checkpoint(step=1, model={"w": np.full(5000, 1)}))
    loaded = manager.load(1, mmap=True, verify="lazy")
    manager.save(Checkpoint(step=1, model={"w": np.full(5000, 2)}))
    path.unlink()
    assert (loaded.model["w"] == 1).all()


def test_lazy_goes_with_mmap(manager):
    manager.save(Checkpoint(step=1))
    with pytest.raises(ConfigError, match="mmap=True"):
        manager.load(1, verify="lazy")


def test_another_word_for_how_to_verify_is_refused(manager):
    manager.save(Checkpoint(step=1))
    with pytest.raises(ConfigError, match="lasy"):
        manager.load(1, mmap=True, verify="lasy")


def test_a_lazy_state_reads_like_a_dict(lazy):
    assert len(lazy.model) == len(NESTED)
    assert sorted(lazy.model) == sorted(NESTED)
    assert "w" in lazy.model
    assert "v" not in lazy.model
    assert lazy.model.get("v") is None
    with pytest.raises(KeyError):
        lazy.model["v"]
    assert plain(lazy.model) == plain(NESTED)
    assert type(lazy.model["list"][2]) is tuple
    assert lazy.model["w"] is lazy.model["w"]
    assert lazy.model["inner"] == lazy.model["inner"]
    assert lazy.model == lazy.model.copy()
    assert lazy.model != lazy.optimizer
    assert lazy.model["inner"]["empty"] == {}
    assert (lazy.rng, lazy.history) == ({}, {})


@pytest.mark.parametrize("copy", [dict, lambda state: state.copy()], ids=["dict()", "copy()"])
def test_a_copy_of_a_lazy_state_is_a_plain_dict(lazy, copy):
    copied = copy(lazy.model)
    assert type(copied) is dict
    assert plain(copied) == plain(NESTED)
    copied["w"] = 0
    assert (lazy.model["w"] == NESTED["w"]).all()


def test_the_copy_method_gives_plain_dicts_all_the_way_down(lazy):
    """For who works on its copy, as torch's optimizers do."""

    def is_plain(value: Any) -> bool:
        if isinstance(value, Mapping):
            return type(value) is dict and all(map(is_plain, value.values()))
        return all(map(is_plain, value)) if isinstance(value, (list, tuple)) else True

    assert is_plain(lazy.model.copy())


def test_only_what_is_touched_is_verified_and_that_once(manager, monkeypatch):
    manager.save(Checkpoint(step=1, model=NESTED, history={"loss": np.arange(9)}))
    verified = []
    honest = verified_read.verify_content

    def watched(content, tensors) -> None:
        verified.extend(tensor.name for tensor in tensors)
        honest(content, tensors)

    monkeypatch.setattr(verified_read, "verify_content", watched)
    lazy = manager.load(1, mmap=True, verify="lazy")
    assert (len(lazy.model), repr(lazy.model), lazy.model["scalar"]) == (5, repr(lazy.model), 1.5)
    assert verified == []
    for _ in range(2):
        assert lazy.model["w"].sum() == 15
        assert lazy.model["inner"][0].sum() == 21
    assert verified == ["model.w", "model.inner.0"]
    assert lazy.model["list"][1]["deep"].sum() == 3
    assert "history.loss" not in verified


def test_what_is_damaged_is_named_when_it_is_touched_and_the_rest_can_be_used(manager):
    path = manager.save(Checkpoint(step=1, model=NESTED, optimizer={"m": np.arange(8)}))
    damage(manager, path, "model.inner.0")

    lazy = manager.load(1, mmap=True, verify="lazy")

    inner = lazy.model["inner"]
    assert (lazy.model["w"] == NESTED["w"]).all()
    assert (lazy.optimizer["m"] == np.arange(8)).all()
    for touch in (
        lambda: inner[0],
        lambda: dict(inner),
        lambda: lazy.model.copy(),
        lambda: manager.save(Checkpoint(step=2, model=lazy.model)),
    ):
        with pytest.raises(CorruptCheckpoint, match=r"model\.inner\.0 is damaged") as caught:
            touch()
        assert (caught.value.path, caught.value.tensor) == (path, "model.inner.0")
    assert manager.list_checkpoints() == [1]


def test_a_damaged_header_is_found_at_once(manager):
    path = manager.save(Checkpoint(step=1, model=NESTED))
    raw = bytearray(path.read_bytes())
    raw[300] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CorruptCheckpoint):
        manager.load(1, mmap=True, verify="lazy")


@pytest.mark.parametrize("save", ["save", "save_async"])
def test_a_lazy_state_can_be_saved_again_and_is_the_same(manager, lazy, save):
    first = manager.inspect(1).state_digest

    getattr(manager, save)(lazy)  # over the file that it is a view of
    manager.close()

    assert manager.inspect(1).state_digest == first
    assert plain(manager.load(1).model) == plain(NESTED)


@needs_torch
def test_torch_goes_on_from_a_lazy_state_as_from_its_own(manager):
    torch.manual_seed(1)
    model, other = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    make = torch.optim.AdamW
    optimizer, another = make(model.parameters()), make(other.parameters())

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.ones(2, 5)).square().sum().backward()
        optimizer.step()

    step(model, optimizer)
    manager.save(Checkpoint(step=1, model=model.state_dict(), optimizer=optimizer.state_dict()))
    lazy = manager.load(1, framework="torch", mmap=True, verify="lazy")
    other.load_state_dict(lazy.model)
    another.load_state_dict(lazy.optimizer)
    for _ in range(2):
        step(model, optimizer)
        step(other, another)

    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    manager.validate(1)  # the file is as it was
