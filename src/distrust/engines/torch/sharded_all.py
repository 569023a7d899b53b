"""``--shard all``: each rank has one Nth of the weights, gradients and moments; all weights are trained.

FSDP2 of torch divides each weight by its rows, gathers a layer where it computes, and adds the gradients of
all ranks in the order of its library: the last bits depend on the number of ranks. AdamW and all else works
on the rows of this rank, as plain tensors in the same memory. A checkpoint has the whole weights, and loads
on any number of ranks; all ranks write it together (``checkpoint/shared_writer.py``).

A rank loads the whole model before it keeps its rows. All ranks make the same passes, which are collectives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from distrust.checkpoint.arrays import Shard
from distrust.config import TrainConfig
from distrust.contract import EngineState, Losses
from distrust.data import MicroBatch
from distrust.engines.micro_batches import gather_losses, owner, require_same_step
from distrust.engines.out_of_memory import out_of_memory
from distrust.engines.runtime import has_experts
from distrust.engines.torch import adapter, optimizer, runtime, sharded_base
from distrust.engines.torch.engine import TorchEngine
from distrust.engines.torch.model_runner import DeviceLosses, ModelRunner, fetch
from distrust.engines.torch.peers import TorchPeers
from distrust.engines.torch.ranks import TorchRanks
from distrust.engines.torch.row import DeviceRow, Row
from distrust.errors import ConfigError
from distrust.ranks import Ranks


class _Root(torch.nn.Module):
    """The unit of the weights outside the layers: it has them whole while ``compute`` runs."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Any) -> Any:
        return compute()


class _Runner(ModelRunner):
    """Runs the model within the root's pass, once there is one: also the loss, which applies the head."""

    root: Any = None
    whole: dict[str, Any]  # the weights as the model has them, with the shapes of whole ones

    def _losses(self, row: Row, arrays: DeviceRow, *, scale: float) -> tuple[Tensor, Tensor]:
        compute = partial(super()._losses, row, arrays, scale=scale)
        return compute() if self.root is None else self.root(compute)


class ShardedEngine(TorchEngine):
    """A :class:`TorchEngine` that has one rank's rows of everything that is trained."""

    runner_class = _Runner
    _runner: _Runner

    def __init__(self, config: TrainConfig, objects: tuple[Any, Any] | None, ranks: Ranks) -> None:
        if problem := _find_problem(config, ranks):
            raise ConfigError(f"--shard all: {problem}")
        assert isinstance(ranks, TorchRanks)  # noqa: S101 - one of several ranks, with torch
        self.peers: TorchPeers = TorchPeers(ranks)
        super().__init__(config, objects, ranks)

    def _prepare(self, base: Any, config: TrainConfig, **dtypes: torch.dtype) -> None:
        if has_experts(base.named_modules()):
            raise ConfigError("--shard all: not for a mixture of experts, whose ranks may lack gradients")
        super()._prepare(base, config, **dtypes)  # the trials run on whole weights
        self._exchange = None
        self._runner.root = root = _divide(base, self._device, count=self.world_size)
        self._runner.whole = {**adapter.trained_parameters(base)}
        self._trained.clear()
        self._optimizer = None  # type: ignore[assignment]  # it has whole weights
        _ = self.deterministic  # the first pass, on all ranks at once
        with torch.no_grad():
            rows = {name: weight.to_local() for name, weight in self._runner.whole.items()}
        self._trained.update({name: torch.nn.Parameter(each) for name, each in rows.items()})
        self._optimizer = optimizer.make_optimizer(self._trained, config)
        root.zero_grad()

    @property
    def parameters(self) -> tuple[int, int]:
        """Number of trained weights, and of all weights: all are trained."""
        return (super().parameters[1],) * 2

    def environment(self) -> dict[str, Any]:
        """As of a :class:`TorchEngine`, with what the order of the sums depends on."""
        return {**super().environment(), "shard": "all", "ranks": self.world_size}

    def accumulate(
        self, batches: Sequence[MicroBatch], *, seed: int, step: int, tokens: int
    ) -> Sequence[Losses]:
        """Forward and backward of this rank's micro-batches, each beside one of every other rank."""
        require_same_step(self._ranks, batches, step=step, tokens=tokens)
        losses: dict[int, DeviceLosses] = {}
        self._clear_gradients()
        for number, batch in enumerate(batches):
            if owner(number, count=len(batches), ranks=self.world_size) == self._ranks.index:
                self.begin_micro_step(seed=seed, step=step, micro_step=number)
                losses[number] = self.micro_step(batch, tokens=tokens)
        for name, weight in self._runner.whole.items():
            self._trained[name].grad = None if weight.grad is None else weight.grad.to_local()
        fetch([*losses.values()])
        return gather_losses(self._ranks, batches, losses)

    @out_of_memory("step")
    def clip_gradients(self, max_norm: float) -> float:
        """Scale the gradients down to ``max_norm`` (0: leave them); returns their norm on all ranks."""
        gradients = [weight.grad for weight in self._trained.values() if weight.grad is not None]
        with self._settings():
            norm = float(torch.nn.utils.get_total_norm(gradients))
            norm = math.sqrt(sum(self._ranks.gather(np.array([norm**2]))[:, 0]))  # in the order of the ranks
            limit, total = max_norm or math.inf, torch.tensor(norm, device=self._device)
            torch.nn.utils.clip_grads_with_norm_(self._trained.values(), limit, total)
        self._step_losses.clear()
        return norm

    def is_finite(self) -> bool:
        """Whether all trained weights and moments are finite, on all ranks."""
        return bool(self._ranks.gather(np.array([super().is_finite()])).all())

    def checksum(self) -> int:
        """The sum of the checksums of all ranks."""
        return int(self._ranks.gather(np.array([super().checksum() % 2**63])).sum())

    def state(self) -> EngineState:
        """As of a :class:`TorchEngine`, with this rank's shards of the weights and moments."""
        state = super().state()

        def shard(name: str, array: Tensor) -> Any:
            return Shard(array, tuple(self._runner.whole[name].shape)) if array.ndim else array

        names = [name for group in state.optimizer["param_groups"] for name in group["param_names"]]
        moments = {
            number: {key: shard(names[number], array) for key, array in each.items()}
            for number, each in state.optimizer["state"].items()
        }
        model = {name: shard(name, array) for name, array in state.model.items()}
        return EngineState(model, {**state.optimizer, "state": moments}, state.rng)

    @out_of_memory("load")
    def load_state(self, state: EngineState) -> None:
        """Take this rank's rows of a state, an array at a time; only the leader's arrays have contents."""

        def take(array: Any) -> Tensor:
            tensor = torch.as_tensor(array)
            return self.peers.scatter(tensor) if tensor.ndim else tensor

        self._runner.root.reshard()  # an evaluation leaves its weights whole
        optimizer.restore(state, self._trained, self._optimizer, undivided=self._runner.whole, take=take)
        runtime.load_rng_state(state.rng, self._device)

    def _drop_gradients(self) -> None:
        super()._drop_gradients()
        for weight in self._runner.whole.values():
            weight.grad = None


def _find_problem(config: TrainConfig, ranks: Ranks) -> str:
    """Why the model cannot be divided among these ranks; empty if it can."""
    if config.compile or config.reduction == "fast":
        return f"not with {'--compile' if config.compile else '--reduction fast: it adds in its own order'}"
    local = {"local_index": ranks.local_index, "local_count": ranks.local_count}
    return sharded_base.find_problem(config, ranks, runtime.choose_device(config.device, **local))


def _divide(model: Any, device: torch.device, *, count: int) -> Any:
    """Divide a model's weights among the ranks, each layer a unit; returns the root, which runs it."""
    mesh = init_device_mesh(device.type, (count,))
    root: Any = _Root(model)
    try:
        for module in (*runtime.repeated_blocks(model), root):
            fully_shard(module, mesh=mesh)
    except (ValueError, NotImplementedError) as error:  # a weight without dimensions, say
        raise ConfigError(f"--shard all: torch cannot divide this model: {error}") from error
    for unit in root.modules():
        if isinstance(unit, FSDPModule):
            unit.set_gradient_divide_factor(1.0)  # the losses are divided by the tokens of all ranks
            unit.set_force_sum_reduction_for_comms(True)  # gloo can only add
    return root
