"""The state of all that an ``Accelerator`` prepared, as one verified checkpoint: nothing is pickled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import length_hint
from typing import Any

from accelerate import Accelerator, DistributedType, skip_first_batches
from accelerate.data_loader import SeedableRandomSampler
from torch import Tensor
from torch.nn import ModuleList
from torch.utils.data import IterableDataset

from distrust.checkpoint import Checkpoint
from distrust.errors import ConfigError
from distrust.integrations.random import generators, set_generators
from distrust.integrations.settings import refuse_differences


class ResumableLoader:
    """The batches of a prepared loader: each iteration is an epoch, or what is left of one.

    It registers itself, so that a checkpoint has its position. A resumed epoch begins with the generators of
    its start, skips the batches that were given out, and goes on with the generators of the checkpoint.
    """

    def __init__(self, accelerator: Accelerator, loader: Any) -> None:
        if loader not in accelerator._dataloaders:
            raise ConfigError("give ResumableLoader the loader that accelerator.prepare() returned")
        sampler = loader.get_sampler()
        generator = (
            None if isinstance(sampler, SeedableRandomSampler) else getattr(sampler, "generator", None)
        )
        if loader.use_stateful_dataloader or loader.generator or generator:
            # prepare() makes a stateful loader's first iterator: a resumed epoch gets the order of epoch 0.
            raise ConfigError("use_stateful_dataloader=True and generator= are not supported: leave them out")
        if loader.batch_sampler is None and not isinstance(loader.dataset, IterableDataset):
            raise ConfigError("accelerate cannot skip in a loader with batch_size=None: give it a batch_size")
        self.epoch = self.batch = 0  #: complete epochs, and batches of the next one that were given out
        self._loader = loader
        self._epoch_start: Mapping[str, Any] = {}  # the generators then
        accelerator.register_for_checkpointing(self)

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches that are left: none if the checkpoint is of an epoch's last one."""
        state, loader, skipped = generators(), self._loader, self.batch
        loader.set_epoch(self.epoch)
        if skipped:
            set_generators(self._epoch_start)
            loader = skip_first_batches(loader, skipped)
        else:
            self._epoch_start = state
        batches = iter(loader)
        batch = next(batches, None)
        if skipped:
            set_generators(state)
        while batch is not None:
            self.batch += 1
            yield batch
            batch = next(batches, None)
        self.epoch, self.batch = self.epoch + 1, 0
        self._loader.set_epoch(self.epoch)  # a loader that skips has counted its own

    def state_dict(self) -> dict[str, Any]:
        """The position."""
        return {"epoch": self.epoch, "batch": self.batch, "epoch_start": self._epoch_start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the position."""
        self.epoch, self.batch, self._epoch_start = state["epoch"], state["batch"], state["epoch_start"]


def capture(accelerator: Accelerator, step: int, **fields: Any) -> Checkpoint:
    """The state of all that was prepared or registered, after ``step`` optimizer steps; no frozen weights.

    ``fields``: ``metadata``, ``metrics`` and ``measured_on`` of :class:`Checkpoint`. Raises ConfigError with
    several processes, FSDP or DeepSpeed, and while gradients are accumulated.
    """
    if excess := ", ".join(sorted(fields.keys() - {"metadata", "metrics", "measured_on"})):
        raise ConfigError(f"capture() takes no {excess}: register_for_checkpointing() saves other objects")
    if not accelerator.sync_gradients:
        raise ConfigError("accumulated gradients cannot be saved: capture if accelerator.sync_gradients")
    parameters, buffers, parts, settings = _collect(accelerator)
    # Of seedable samplers; prepare() draws it, and each epoch's order is its.
    seeds = [getattr(loader.get_sampler(), "initial_seed", None) for loader in accelerator._dataloaders]
    return Checkpoint(
        step=step,
        model=parameters,
        optimizer={"parts": [part.state_dict() for part in parts]},
        # Buffers change in the forward pass, when an overlapping save may still be copying ``model``.
        rng={"now": generators(), "buffers": buffers},
        history={"epochs": [loader.iteration for loader in accelerator._dataloaders], "seeds": seeds},
        config=settings,
        run={"integration": {"program": "accelerate"}},
        **fields,
    )


def restore(accelerator: Accelerator, checkpoint: Checkpoint) -> int:
    """Set everything to a checkpoint that was loaded with ``framework="torch"``; return its step.

    Raises ResumeRefused, and sets nothing, if it is of other objects, shapes or settings than now.
    """
    parameters, buffers, parts, settings = _collect(accelerator)
    refuse_differences(checkpoint.step, checkpoint.config, settings)
    if not all(isinstance(tensor, Tensor) for tensor in checkpoint.model.values()):
        raise ConfigError('the checkpoint has arrays of another library: load it with framework="torch"')
    for tensors, saved in ((parameters, checkpoint.model), (buffers, checkpoint.rng["buffers"])):
        for name, tensor in tensors.items():
            tensor.copy_(saved[name])
    for part, state in zip(parts, checkpoint.optimizer["parts"], strict=True):
        part.load_state_dict(state)
    epochs, seeds = checkpoint.history["epochs"], checkpoint.history["seeds"]
    for loader, epoch, seed in zip(accelerator._dataloaders, epochs, seeds, strict=True):
        loader.iteration = epoch
        if seed is not None:
            loader.get_sampler().initial_seed = seed
    accelerator.step = 0  # micro-batches since the last optimizer step
    set_generators(checkpoint.rng["now"])
    return checkpoint.step


def _collect(accelerator: Accelerator) -> tuple[dict[str, Any], dict[str, Any], list[Any], dict[str, Any]]:
    """Trained parameters, buffers, what has a ``state_dict``, and the settings that a resume must share."""
    if accelerator.distributed_type != DistributedType.NO:
        raise ConfigError(f"{accelerator.distributed_type} is not supported: train in a single process")
    models = ModuleList([accelerator.unwrap_model(model) for model in accelerator._models])
    parameters = {name: each.detach() for name, each in models.named_parameters() if each.requires_grad}
    buffers = dict(models.named_buffers())
    optimizers = [each.optimizer for each in accelerator._optimizers]
    parts = [*optimizers, *(each.scheduler for each in accelerator._schedulers), *accelerator._custom_objects]
    parts += [accelerator.scaler] if accelerator.scaler else []
    settings = {
        "the list of objects": [type(each).__name__ for each in (*models, *parts)],
        "mixed_precision": accelerator.mixed_precision,
        "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
    }
    for number, loader in enumerate(accelerator._dataloaders):
        size = getattr(loader.batch_sampler, "batch_size", None)
        layout = [type(loader.get_sampler()).__name__, length_hint(loader.dataset), size, length_hint(loader)]
        settings[f"sampler, examples, batch size and batches of loader {number}"] = layout
    for name, tensor in {**parameters, **buffers}.items():
        settings[f"the shape and type of {name}"] = [*tensor.shape, str(tensor.dtype)]
    for number, optimizer in enumerate(optimizers):  # as it was made: a schedule changes those of its groups
        options = {name: each for name, each in optimizer.defaults.items() if not isinstance(each, Tensor)}
        options["the size of the groups"] = [len(group["params"]) for group in optimizer.param_groups]
        settings |= {f"{name} of optimizer {number}": options[name] for name in sorted(options)}
    return parameters, buffers, parts, settings
