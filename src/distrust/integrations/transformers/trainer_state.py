"""The state of a Trainer, as a checkpoint and back."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import EarlyStoppingCallback, Trainer, TrainerState
from transformers.trainer_callback import ExportableState

from distrust.checkpoint import Checkpoint
from distrust.integrations.random import generators
from distrust.integrations.transformers.description import Tensors, trainable_parameters

#: Ends of the names of logged timings. They are not saved, so that equal runs have equal checkpoints.
_TIMINGS = ("_runtime", "_per_second")
#: What TRL's trainers collect until the next log, by attribute.
_COLLECTED = ("_metrics", "_total_train_tokens")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepEnd:
    """All that a Trainer holds at the end of a complete step, but weights, moments and the learning rate.

    Taken as a whole, after what the step logs and evaluates: nothing that happens later is mixed in.
    """

    position: tuple[int, int]  # epoch, and batches of it that were trained
    epoch_generators: dict[str, Any]  # as of the start of the epoch, which draws its order from them
    generators: dict[str, Any]
    state: dict[str, Any]  # fields of TrainerState; of its log, the number of entries
    callbacks: dict[str, Any]
    loss_sum: torch.Tensor  # since the last log
    sums: dict[str, Any]
    collected: dict[str, Any]
    buffers: Tensors

    @classmethod
    def of(
        cls,
        trainer: Trainer,
        *,
        position: tuple[int, int],
        epoch_generators: dict[str, Any],
        buffers: Tensors,
        logged_last: tuple[Any, float | None],
        best_step: int | None,
    ) -> StepEnd:
        """The state now.

        ``buffers`` are those that training may change, ``logged_last`` is the gradient norm and learning rate
        of the step. ``best_step`` has a checkpoint.
        """
        flos = trainer.state.total_flos + float(trainer.current_flos)
        return cls(
            position=position,
            epoch_generators=epoch_generators,
            generators=generators(),
            state={**vars(trainer.state), "total_flos": flos, "log_history": len(trainer.state.log_history)},
            callbacks=_callback_states(trainer),
            loss_sum=trainer._tr_loss.clone(),
            sums={
                "total_loss": trainer._total_loss_scalar,
                "last_logged": trainer._globalstep_last_logged,
                "grad_norm": logged_last[0],
                "learning_rate": logged_last[1],
                "best_step": best_step,
                "is_training": trainer.model.training,  # in which TRL logs the summary of the run
            },
            collected=_copy({name: getattr(trainer, name) for name in _COLLECTED if hasattr(trainer, name)}),
            buffers={name: buffer.clone() for name, buffer in buffers.items()},
        )

    @property
    def step(self) -> int:
        """The number of complete steps."""
        return int(self.state["global_step"])


def capture(
    trainer: Trainer,
    step_end: StepEnd,
    *,
    description: Mapping[str, Any],
    run: Mapping[str, Any],
    finished: bool,
) -> Checkpoint:
    """The checkpoint of ``step_end``: weights and moments must not have changed since.

    Arrays are those of the Trainer: they are copied when the checkpoint is saved.
    """
    history = [
        {key: value for key, value in entry.items() if not key.endswith(_TIMINGS)}
        for entry in trainer.state.log_history[: step_end.state["log_history"]]
        if not {"train_loss", "total_flos"} <= entry.keys()  # the summary: each end of training logs it again
    ]
    state = {
        **step_end.state,
        "log_history": history,
        "num_input_tokens_seen": int(step_end.state["num_input_tokens_seen"]),
        "best_model_checkpoint": None,  # a path: it may differ between equal runs
        "stateful_callbacks": step_end.callbacks,
    }
    grad_norm = step_end.sums["grad_norm"]  # a number, or a tensor
    evaluations = [entry for entry in history if entry.get("step") == step_end.step]
    scaler = getattr(trainer.accelerator, "scaler", None)
    return Checkpoint(
        step=step_end.step,
        model={"parameters": {name: value.detach() for name, value in trainable_parameters(trainer).items()}},
        optimizer={
            "optimizer": trainer.optimizer.state_dict(),
            "scheduler": trainer.lr_scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        },
        rng={"now": step_end.generators, "epoch": step_end.epoch_generators, "buffers": step_end.buffers},
        history={"trainer_state": to_array(state), "collected": step_end.collected},
        config=description,
        metadata={
            "integration": "transformers",
            "trainer": {  # one mapping: numbers beside it would be listed as metrics
                **step_end.sums,
                "position": list(step_end.position),
                "loss_sum": float(step_end.loss_sum),
                "grad_norm": None if grad_norm is None else float(grad_norm),
                "finished": finished,
            },
        },
        metrics={
            key: float(value)
            for entry in evaluations
            for key, value in entry.items()
            if key.startswith("eval_") and isinstance(value, Real)
        },
        run=run,
    )


def saved_trainer_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """The ``trainer_state.json`` of a checkpoint."""
    state: dict[str, Any] = json.loads(np.asarray(checkpoint.history["trainer_state"]).tobytes())
    return state


def changing_buffers(trainer: Trainer) -> dict[str, tuple[torch.nn.Module, str]]:
    """The module and the attribute of each buffer that training may change, by name.

    These are the persistent ones, but for modules with packed weights: an integer buffer of two dimensions.
    """
    return {
        f"{prefix}.{name}" if prefix else name: (module, name)
        for prefix, module in trainer.model.named_modules()
        if not any(b.dim() > 1 and not b.is_floating_point() for b in module.buffers(recurse=False))
        for name, _ in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


def restore_model(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Set trained parameters, and buffers."""
    _set_weights(trainer, {**checkpoint.model["parameters"], **checkpoint.rng["buffers"]})


@contextlib.contextmanager
def weights_of(trainer: Trainer, checkpoint: Checkpoint) -> Iterator[None]:
    """Give the model the weights of a checkpoint, and after the block its own again."""
    tensors = _named_tensors(trainer)
    names = {*checkpoint.model["parameters"], *checkpoint.rng["buffers"]}
    weights = {name: tensors[name].detach().clone() for name in names}
    try:
        restore_model(trainer, checkpoint)
        yield
    finally:
        _set_weights(trainer, weights)


def restore_optimizer(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Set the optimizer and the learning-rate scheduler."""
    trainer.optimizer.load_state_dict(checkpoint.optimizer["optimizer"])
    trainer.lr_scheduler.load_state_dict(checkpoint.optimizer["scheduler"])


def restore_sums(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Set what is logged later: sums of losses, and what TRL's trainers collect."""
    sums = checkpoint.metadata["trainer"]
    trainer._tr_loss = torch.tensor(sums["loss_sum"], device=trainer.args.device)
    trainer._total_loss_scalar = sums["total_loss"]
    trainer._globalstep_last_logged = sums["last_logged"]
    trainer._initial_global_step = 0  # train_loss is the mean over the whole run
    for name, value in checkpoint.history["collected"].items():
        if name == "_metrics":
            for mode, lists in _copy(value).items():
                trainer._metrics[mode].clear()  # its defaultdict stays
                trainer._metrics[mode].update(lists)
        else:
            setattr(trainer, name, value)


def restore_callbacks(trainer: Trainer, state: Mapping[str, Any]) -> None:
    """Set the attributes of callbacks that have a state, such as the patience of early stopping."""
    for name, callbacks in _stateful_callbacks(trainer).items():
        saved = state["stateful_callbacks"].get(name, [])
        for callback, entry in zip(callbacks, saved if isinstance(saved, list) else [saved], strict=False):
            for attribute, value in entry.get("attributes", {}).items():
                setattr(callback, attribute, value)


def is_finished(trainer: Trainer) -> bool:
    """Whether the run is at its end: it made all steps, or early stopping stopped it."""
    return trainer.state.global_step >= trainer.state.max_steps or any(
        isinstance(callback, EarlyStoppingCallback)
        and callback.early_stopping_patience_counter >= callback.early_stopping_patience
        for callback in trainer.callback_handler.callbacks
    )


def _named_tensors(trainer: Trainer) -> Tensors:
    return {**dict(trainer.model.named_buffers()), **dict(trainer.model.named_parameters())}


def _set_weights(trainer: Trainer, weights: Mapping[str, torch.Tensor]) -> None:
    tensors = _named_tensors(trainer)
    with torch.no_grad():
        for name, value in weights.items():
            tensors[name].copy_(value)


def _stateful_callbacks(trainer: Trainer) -> dict[str, list[Any]]:
    """By the name of their class, as the Trainer identifies them."""
    callbacks: dict[str, list[Any]] = {}
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ExportableState):
            callbacks.setdefault(type(callback).__name__, []).append(callback)
    return callbacks


def _callback_states(trainer: Trainer) -> dict[str, Any]:
    """In the format of ``trainer_state.json``: a list where a class has several callbacks."""
    states = {
        name: [callback.state() for callback in callbacks]
        for name, callbacks in _stateful_callbacks(trainer).items()
    }
    return {name: entries if len(entries) > 1 else entries[0] for name, entries in states.items()}


def _copy(collected: Any) -> Any:
    """The same numbers in plain dicts and lists of their own."""
    if isinstance(collected, Mapping):
        return {key: _copy(value) for key, value in collected.items()}
    return list(collected) if isinstance(collected, list) else collected


def to_array(value: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """JSON as an array: it grows with the run, and a header must not."""
    return np.frombuffer(json.dumps(value, sort_keys=True).encode(), np.uint8)


@contextlib.contextmanager
def resume_folder(trainer: Trainer, checkpoint: Checkpoint) -> Iterator[str]:
    """A folder from which the Trainer reads its state; everything else it asks AttachedCheckpoints for."""
    args = trainer.args
    evaluates_on_start, args.eval_on_start = args.eval_on_start, False  # the start is past
    names = {field.name for field in dataclasses.fields(TrainerState)}
    state = saved_trainer_state(checkpoint)
    text = json.dumps({name: value for name, value in state.items() if name in names})
    try:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "trainer_state.json").write_text(text, "utf-8")
            yield folder
    finally:
        args.eval_on_start = evaluates_on_start
