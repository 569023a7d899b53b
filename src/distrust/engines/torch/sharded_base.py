"""``--shard base``: each of N ranks holds one Nth of the frozen base, and gathers a layer where it computes.

transformers loads only a rank's slices, by FSDP2 of torch. The adapter and its moments are equal on all
ranks, and nothing is gathered at a save. Gathered weights have the bits of whole ones. FSDP2 gathers a unit,
such as a layer, when it runs; what reads weights elsewhere gathers them here. All ranks gather together, so
they make equally many passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import _world, destroy_process_group
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from distrust.config import TrainConfig
from distrust.engines import loading
from distrust.engines.torch.fingerprint import describe
from distrust.engines.torch.loss import chunked_losses
from distrust.engines.torch.model import load_model, stored_weights
from distrust.engines.torch.model_runner import DeviceLosses, ModelRunner
from distrust.engines.torch.row import Row
from distrust.errors import ConfigError, ModelError
from distrust.ranks import Ranks, gather_json


def find_problem(config: TrainConfig, ranks: Ranks, device: torch.device) -> str:
    """Why no model can be divided among these ranks; empty if one can."""
    accelerator = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    count = ranks.count
    if count == 1:
        return "there is only one process; start several with --nproc, or leave it out"
    if config.gradient_accumulation % count:
        return f"all ranks make equally many passes; give a multiple of {count} to --gradient-accumulation"
    if device.type != accelerator.type or device.index not in (None, ranks.local_index):
        return f"each rank needs the {accelerator.type} that --device auto selects, not {device}"
    return ""


def load(config: TrainConfig, ranks: Ranks, objects: Any, *, dtype: torch.dtype, device: torch.device) -> Any:
    """Load this rank's slices of the base, in evaluation mode and frozen.

    Raises what :func:`distrust.engines.torch.model.load_model` does, and ConfigError where they cannot be
    divided among these ranks, or bits would differ.
    """
    problem = find_problem(config, ranks, device)
    if objects:
        problem = "a program passes the model; give TrainConfig(model=...) its folder or hub name"
    elif not hasattr(FSDPModule, "reset_iter_state"):
        problem = f"requires torch 2.13 or later; this is {torch.__version__}"
    if problem:
        raise ConfigError(f"--shard base: {problem}")
    groups = {*_world.pg_map}  # torch lists them nowhere else
    base: Any = load_model(config.model, dtype=dtype, device=device, quantized="none", parts=ranks.count)
    for group in {*_world.pg_map} - groups:  # of the dimensions that are not divided: sockets and threads
        destroy_process_group(group)
    base.requires_grad_(False)  # gathered weights take this from the slices
    units, head = _units(base), base.get_output_embeddings()
    for name, module in base.named_modules():
        weights = [*module.parameters(recurse=False)]
        if weights and units[module] is base and module is not head:
            problem = f"transformers does not divide {name}"
        elif device.type == "cpu" and any(weight.ndim == 2 and len(weight) == 1 for weight in weights):
            problem = f"on a CPU, bits depend on where in memory {name} is, which has a weight of one row"
        else:
            continue
        raise ConfigError(f"--shard base: {problem}, in models of type {base.config.model_type}")
    try:
        with torch.no_grad():  # FSDP2 requires that the first pass is the root's
            base(input_ids=torch.zeros(1, 4, dtype=torch.long, device=device))
    except Exception as error:  # a model's code may raise anything
        raise loading.load_error(config.model, error) from error
    base.reset_iter_state()
    base.whole_head = None
    if device.type == "cpu" and head is not None and head.bias is None:
        # A single process maps the file: where its head lies decides the bits of a product with one token.
        stored = dict(stored_weights(config.model, dtype=None))
        name = next(name for name, weight in base.named_parameters() if weight is head.weight)
        if name in stored:
            base.whole_head = SimpleNamespace(weight=stored[name].to(dtype), bias=None)
    return base


@torch.no_grad()
def digest(base: Any, config: TrainConfig, ranks: Ranks) -> Callable[[], str]:
    """What :func:`distrust.engines.torch.fingerprint.start` returns, with the result of a single process.

    The first rank of each machine reads the machine's files, so that other weights in some are noticed. What
    no file has by its name, because transformers merges some weights, is gathered.
    """
    stored = dict(stored_weights(config.model, dtype=None))  # mapped, and read one by one
    weights, text = sorted(base.named_parameters()), ""
    if ranks.local_index == 0 or not stored.keys() >= dict(weights).keys():
        pairs = ((n, stored[n].to(w.dtype) if n in stored else w.full_tensor()) for n, w in weights)
        text = loading.fingerprint(describe(pairs, config.model))
    text = gather_json(ranks, text)[ranks.index - ranks.local_index]
    return lambda: text


def gather_each(modules: Iterable[torch.nn.Module], *, base: Any) -> Iterator[torch.nn.Module]:
    """The modules of a model with an adapter, each while its weights are whole."""
    units = _units(base)
    for unit, group in groupby(modules, lambda module: units.get(module, base)):  # peft's are outside
        unit.unshard()
        yield from group
        unit.reshard()


class ShardedRunner(ModelRunner):
    """Runs a model whose base is divided. Raises ModelError if weights of the base would be trained."""

    def __init__(self, model: Any, **options: Any) -> None:
        super().__init__(model, **options)
        for name, weight in model.named_parameters():
            if isinstance(weight, DTensor) and weight.requires_grad:
                raise ModelError(f"--shard base: the base is frozen, but {name} would be trained")

    def _run_batch(self, row: Row, *, scale: float, backward: bool) -> DeviceLosses:
        try:
            return super()._run_batch(row, scale=scale, backward=backward)
        finally:  # a pass that fails, or has no backward, leaves weights whole and the next one confused
            self._model.reset_iter_state()

    def _head_losses(self, hidden: Tensor, *arrays: Tensor) -> tuple[Tensor, Tensor]:
        if self._model.whole_head:
            return chunked_losses(hidden, self._model.whole_head, *arrays)
        unit = _units(self._model)[self._head]
        unit.unshard()
        losses = super()._head_losses(hidden, *arrays)
        unit.reshard()
        return losses


def _units(base: torch.nn.Module) -> dict[torch.nn.Module, FSDPModule]:
    """The unit of each module: the innermost that contains it."""
    return {part: unit for unit in base.modules() if isinstance(unit, FSDPModule) for part in unit.modules()}
