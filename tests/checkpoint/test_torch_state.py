"""torch optimizers resume from a checkpoint bit-identically."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from distrust import Checkpoint, CheckpointManager

torch = pytest.importorskip("torch")

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.9, 0.95)),
    "AdamW fused, amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True, amsgrad=True),
    "AdamW, tensor as lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2)),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=1e-1, history_size=4),
}
BATCH = torch.linspace(-1, 1, 5 * 12).reshape(5, 12)


def make_model(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(12, 12, bias=index % 2 == 0) for index in range(8)]
    return torch.nn.Sequential(*layers, torch.nn.Dropout(0.2), torch.nn.Linear(12, 1))


def make_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Two groups with more than ten parameters: their indices sort differently as text."""
    parameters = list(model.parameters())
    assert len(parameters) > 10
    return [{"params": parameters[:3], "weight_decay": 0.1}, {"params": parameters[3:]}]


def take_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(BATCH).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)


def is_identical(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(
            type(k) in {type(j) for j in b} and is_identical(a[k], b[k]) for k in a
        )
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(is_identical, a, b))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_resumes_bit_identically(tmp_path, name):
    model = make_model(seed=1)
    groups = model.parameters() if name == "LBFGS" else make_groups(model)
    optimizer = OPTIMIZERS[name](groups)
    for _ in range(3):
        take_step(model, optimizer)
    with CheckpointManager(tmp_path) as manager:
        manager.save(
            Checkpoint(
                step=3,
                model=model.state_dict(),
                optimizer=optimizer.state_dict(),
                rng={"torch": torch.get_rng_state()},
            )
        )
        loaded = manager.load(3, framework="torch")
        assert is_identical(loaded.optimizer, optimizer.state_dict())
    for _ in range(2):
        take_step(model, optimizer)

    resumed = make_model(seed=2)
    resumed_groups = resumed.parameters() if name == "LBFGS" else make_groups(resumed)
    resumed_optimizer = OPTIMIZERS[name](resumed_groups)
    resumed.load_state_dict(loaded.model)
    resumed_optimizer.load_state_dict(loaded.optimizer)
    torch.set_rng_state(loaded.rng["torch"])
    for _ in range(2):
        take_step(resumed, resumed_optimizer)

    assert is_identical(dict(resumed.state_dict()), dict(model.state_dict()))
    assert is_identical(resumed_optimizer.state_dict(), optimizer.state_dict())


def test_training_that_reloads_everything_ends_with_the_same_state(tmp_path):
    def train(*, reload_every: int | None, manager: CheckpointManager) -> str:
        model = make_model(seed=1)
        optimizer = OPTIMIZERS["AdamW"](make_groups(model))
        for step in range(1, 10):
            take_step(model, optimizer)
            state = Checkpoint(
                step=step,
                model=model.state_dict(),
                optimizer=optimizer.state_dict(),
                rng={"torch": torch.get_rng_state()},
            )
            manager.save(state)
            if reload_every is not None and step % reload_every == 0:
                loaded = manager.load_latest(framework="torch")
                assert loaded.step == step
                model = make_model(seed=step)
                optimizer = OPTIMIZERS["AdamW"](make_groups(model))
                model.load_state_dict(loaded.model)
                optimizer.load_state_dict(loaded.optimizer)
                torch.set_rng_state(loaded.rng["torch"])
        return manager.inspect(9).state_digest

    digests = set()
    for reload_every in (None, 1, 4):
        with CheckpointManager(tmp_path / str(reload_every), keep_last=1) as manager:
            digests.add(train(reload_every=reload_every, manager=manager))
    assert len(digests) == 1
