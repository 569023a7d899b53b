"""Imports a checkpoint folder of transformers' Trainer, or an adapter folder of peft.

The Trainer saves weights by name, but the optimizer's moments by number. The numbers follow the order of the
model's parameters, so the model is built without its weights; its names and shapes must match the folder's.
The optimizer has one group with all parameters, or two: the decayed matrices, then the vectors. Any other
division changes the size of a group or a shape, and is refused.

Only tensors are unpickled: ``training_args.bin`` and ``rng_state.pth`` are never opened.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distrust.config_text import from_mapping
from distrust.engines.torch.optimizer import MOMENTS, make_optimizer
from distrust.errors import CorruptCheckpoint, join_first, quote_untrusted
from distrust.importers import peft_adapter
from distrust.importers.detect import ADAPTER_CONFIG, PEFT_WEIGHTS, TRAINER_STATE, is_trainer_folder
from distrust.importers.imported import Imported
from distrust.importers.peft_adapter import NAMES_SHOWN, TrainedWeights, refusal
from distrust.importers.safe_load import read_json, to_float32
from distrust.importers.torch_file import read_torch
from distrust.training.imported import MAX_STEP

FORMAT, ADAPTER_FORMAT = "transformers Trainer", "peft adapter"
OPTIMIZER = "optimizer.pt"
MAX_STATE_BYTES = 256 << 20

#: Files that identify folders of other kinds -> why they are refused.
_UNSUPPORTED_FILES = {
    "zero_to_fp32.py": "DeepSpeed wrote it, and divided its state among processes",
    "optimizer_0": "FSDP wrote it, and divided its state among processes",
    "pytorch_model_fsdp_0": "FSDP wrote it, and divided its state among processes",
    "pytorch_model_fsdp.bin": "FSDP wrote it, as pickles",
    "model.safetensors.index.json": "its model is divided among files; only a single file is supported",
    "adapter_model.bin": "its adapter is a pickle, and loading one can run any code",
    "pytorch_model.bin": "its model is a pickle, and loading one can run any code",
}
#: Options that the optimizer's file proves.
_OPTIMIZER_OPTIONS = ("adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay")
#: Names of metrics in the Trainer's log -> ours.
METRICS = {"loss": "loss", "grad_norm": "gradient_norm", "learning_rate": "learning_rate"}
_NOT_ADAMW = "not the state of AdamW in full precision (8-bit and other optimizers are not supported)"


def read(folder: Path, *, model: str | None = None) -> Imported:
    """Read what the Trainer or peft saved, in the form of the torch engine.

    Weights and moments become float32, which is exact. ``history`` has what was logged: float64[step], NaN
    where nothing was. An adapter folder of peft is at step 0.

    Args:
        folder: such as ``output/checkpoint-500``.
        model: the base model, a folder or a hub name. Default: the one that the adapter names; for a full
            model, the folder itself.

    Raises:
        CheckpointError: for files that are missing, damaged, too large, or hold pickled objects.
        ModelError: if the base model's config cannot be loaded.
        ResumeRefused: for training that is not supported here, or that does not fit the model.
        ConfigError: for values that no option here accepts.
    """
    is_trainer = is_trainer_folder(folder)
    has_adapter = any(map(os.path.lexists, (folder / PEFT_WEIGHTS, folder / ADAPTER_CONFIG)))
    for name, reason in _UNSUPPORTED_FILES.items():
        if is_trainer and os.path.lexists(folder / name) and not os.path.lexists(folder / PEFT_WEIGHTS):
            raise refusal(folder, f"{reason} ({name})")
    state = read_json(folder / TRAINER_STATE, max_bytes=MAX_STATE_BYTES) if is_trainer else {"global_step": 0}
    step = _count(state, "global_step", folder)
    trained = (peft_adapter.read_adapter if has_adapter else peft_adapter.read_full_model)(folder, model)
    optimizer, optimizer_options, dropped = _read_optimizer(folder, trained, step=step)
    # Numbers to record that do not affect the training.
    numbers: dict[str, Any] = {name: state.get(name) for name in ("epoch", "best_metric", "max_steps")}
    summary = {n: value for n, value in numbers.items() if type(value) in (int, float) and abs(value) < 1e300}
    history, metrics = _read_log(state, step) if is_trainer else ({}, {})
    # Unless it was asked to, the Trainer does not count tokens and says 0.
    tokens = _count(state, "num_input_tokens_seen", folder, default=0)
    return Imported(
        format=FORMAT if is_trainer else ADAPTER_FORMAT,
        step=step,
        model=trained.weights,
        optimizer=optimizer,
        history=history,
        options={**trained.options, **optimizer_options},
        metadata={"tokens_seen": tokens} if tokens else {},
        metrics=metrics,
        dropped=dropped,
        source={"model": trained.base, **({"trainer": summary} if is_trainer else {})},
    )


def _read_optimizer(
    folder: Path, trained: TrainedWeights, *, step: int
) -> tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]:
    """AdamW's state in our groups, the options that it proves, and what is not imported."""
    path = folder / OPTIMIZER
    if not os.path.lexists(path):
        return {}, {}, ()
    groups, saved = _split_state(read_torch(path), path)
    group_options = _group_options(groups, path)
    config = from_mapping({**trained.options, **group_options}, where=str(path))
    # Our own empty state gives the layout of groups and options.
    state = make_optimizer(trained.parameters, config).state_dict()
    names = _name_parameters(groups, trained.parameters, path)
    if saved.keys() != names.keys():
        moments_of, expected = (_list_numbers(numbers) for numbers in (saved, names))
        raise refusal(path, f"has moments of {moments_of}, but its groups name {expected}")
    moments = {
        name: _moments(saved[number], name, trained.parameters[name].shape, path, step=step)
        for number, name in names.items()
    }
    # Our groups number the parameters in their own order.
    ordered = [name for group in state["param_groups"] for name in group["param_names"]]
    state["state"] = {number: moments[name] for number, name in enumerate(ordered)}
    first_group = [*names.values()][: len(groups[0]["params"])]
    dropped: tuple[str, ...] = ()
    if group_options["weight_decay"] and any(trained.parameters[name].ndim < 2 for name in first_group):
        dropped = ("the weight decay of vectors: here only matrices are decayed",)
    return state, {name: getattr(config, name) for name in _OPTIMIZER_OPTIONS}, dropped


def _split_state(saved: Any, path: Path) -> tuple[list[dict[str, Any]], dict[int, Any]]:
    groups, state = map(saved.get, ("param_groups", "state")) if isinstance(saved, dict) else (None, None)
    if (
        type(groups) is not list
        or type(state) is not dict
        or not groups
        or not all(type(group) is dict and type(group.get("params")) is list for group in groups)
    ):
        raise CorruptCheckpoint("not the state of a torch optimizer", path=path)
    # A model without vectors leaves an empty group.
    return [group for group in groups if group["params"]] or groups[:1], state


def _group_options(groups: Sequence[Mapping[str, Any]], path: Path) -> dict[str, Any]:
    adam = []
    for group in groups:
        betas: Any = group.get("betas")
        if (
            type(betas) not in (tuple, list)
            or len(betas) != 2
            or group.get("decoupled_weight_decay") is False
            or group.get("maximize")
            or group.get("amsgrad")
        ):
            raise refusal(path, _NOT_ADAMW)
        adam.append({"adam_beta1": betas[0], "adam_beta2": betas[1], "adam_epsilon": group.get("eps")})
    decays = [group.get("weight_decay") for group in groups]
    if len(groups) > 2 or any(settings != adam[0] for settings in adam) or any(decays[1:]):
        raise refusal(path, "its parameter groups have different options, which is not supported")
    return {**adam[0], "weight_decay": decays[0]}


def _name_parameters(
    groups: Sequence[Mapping[str, Any]], parameters: Mapping[str, torch.nn.Parameter], path: Path
) -> dict[int, str]:
    """Number -> name. Shapes are compared later; then no vector can be mistaken for a matrix."""
    matrices = [name for name, parameter in parameters.items() if parameter.ndim >= 2]
    vectors = [name for name, parameter in parameters.items() if parameter.ndim < 2]
    # A single group: no weight decay, or an optimizer of the user.
    name_groups = [[*parameters]] if len(groups) == 1 else [matrices, vectors]
    if [len(names) for names in name_groups] != [len(group["params"]) for group in groups]:
        counts = " and ".join(str(len(group["params"])) for group in groups)
        problem = f"its groups have {counts} parameters, which are not the model's matrices and vectors"
        raise refusal(path, problem)
    numbers = [number for group in groups for number in group["params"]]
    pairs = [*zip(numbers, [name for names in name_groups for name in names], strict=True)]
    if not all(type(number) is int for number, _ in pairs) or len(dict(pairs)) != len(pairs):
        raise CorruptCheckpoint("its parameters are not numbered", path=path)
    return dict(pairs)


def _moments(values: Any, name: str, shape: torch.Size, path: Path, *, step: int) -> dict[str, torch.Tensor]:
    if type(values) is not dict or values.keys() != {"step", *MOMENTS}:
        raise refusal(path, _NOT_ADAMW)
    steps = values["step"]
    if type(steps) is torch.Tensor and steps.numel() == 1 and steps.device.type == "cpu":
        steps = steps.item()  # newer torch saves a tensor, older an integer
    if type(steps) not in (int, float) or not 0 < steps <= step:
        reason = f"{name}: its step is {quote_untrusted(repr(steps))}; the checkpoint's is {step}"
        raise CorruptCheckpoint(reason, path=path)
    tensors = {m: to_float32(values[m], shape=shape, what=f"{m} of {name}", path=path) for m in MOMENTS}
    if bool((tensors["exp_avg_sq"] < 0).any()):
        raise CorruptCheckpoint(f"exp_avg_sq of {name} is less than 0", path=path)
    return {"step": torch.tensor(float(steps), dtype=torch.float32), **tensors}


def _count(state: Mapping[str, Any], name: str, folder: Path, *, default: int | None = None) -> int:
    value = state.get(name, default)
    if type(value) is not int or not 0 <= value <= (MAX_STEP if default is None else 1 << 62):
        raise CorruptCheckpoint(f"{name} is {quote_untrusted(repr(value))}", path=folder / TRAINER_STATE)
    return value


def _read_log(
    state: Mapping[str, Any], step: int
) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, float]]:
    """History, float64[step] by metric (the loss is a mean since the previous line); metrics of the step."""
    history = {column: np.full(step, np.nan) for column in METRICS.values()}
    metrics: dict[str, float] = {}
    lines = state.get("log_history")
    for line in lines if type(lines) is list else []:
        line_step = line.get("step") if type(line) is dict else None
        # The log is only for display: invalid lines are skipped, not refused.
        if type(line_step) is not int or not 1 <= line_step <= step:
            continue
        for name, metric in (*METRICS.items(), ("eval_loss", "eval_loss")):
            value = line.get(name)
            if type(value) is float and metric in history:
                history[metric][line_step - 1] = value
            if type(value) is float and line_step == step:
                metrics[metric] = value
    return history, {name: value for name, value in metrics.items() if math.isfinite(value)}


def _list_numbers(numbers: Iterable[Any]) -> str:
    shown = [quote_untrusted(repr(number)) for number in numbers]
    return f"{len(shown)} parameters ({join_first(sorted(shown), NAMES_SHOWN)})"
