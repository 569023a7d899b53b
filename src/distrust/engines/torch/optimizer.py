"""AdamW of torch over named parameters: matrices with weight decay, vectors without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from distrust.config import TrainConfig
from distrust.engines.state_conversion import steps_made

#: What it keeps of each parameter beside its number of steps.
MOMENTS = ("exp_avg", "exp_avg_sq")


def make_optimizer(trained: Mapping[str, torch.nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW of what is trained."""
    matrices = [(name, parameter) for name, parameter in trained.items() if parameter.ndim >= 2]
    vectors = [(name, parameter) for name, parameter in trained.items() if parameter.ndim < 2]
    groups = [
        {"params": group, "weight_decay": decay}
        for group, decay in ((matrices, config.weight_decay), (vectors, 0.0))
        if group
    ]
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,  # one pass over weights, moments and gradients
    )


def differences(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> list[str]:
    """A line for each thing by which a saved state is none of this optimizer.

    What is fused believes in the shapes: it would read and write beyond moments that are too small.
    """
    groups = optimizer.param_groups
    if _names(saved["param_groups"]) != _names(groups):
        return ["the optimizer's parameters have other names, or stand in another order"]
    parameters = [
        pair for group in groups for pair in zip(group["param_names"], group["params"], strict=True)
    ]
    state = saved.get("state")
    if not isinstance(state, Mapping) or not set(state) <= set(range(len(parameters))):
        return ["the optimizer's moments are of parameters that it has not"]
    return [line for number, values in state.items() for line in _of_one(values, *parameters[number])]


def load(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Take the moments of a saved state in which there are no :func:`differences`."""
    # Copied: the tensors of a checkpoint lie in one block of memory, which any of them would keep whole.
    moments = {
        number: {name: _moment(value) for name, value in values.items()}
        for number, values in saved["state"].items()
    }
    # The options are this run's, which are compared elsewhere; how it is computed is this version's choice.
    groups = [
        {**ours, "lr": theirs["lr"] if type(theirs.get("lr")) is float else ours["lr"]}
        for ours, theirs in zip(optimizer.state_dict()["param_groups"], saved["param_groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})


def _of_one(values: Any, name: str, parameter: torch.nn.Parameter) -> list[str]:
    if not isinstance(values, Mapping) or values.keys() != {"step", *MOMENTS}:
        return [f"{name}: its moments are not AdamW's"]
    shapes = {moment: getattr(values[moment], "shape", None) for moment in MOMENTS}
    found = [
        f"{moment} of {name}: was {shape and list(shape)}, is {list(parameter.shape)}"
        for moment, shape in shapes.items()
        if shape != parameter.shape
    ]
    if steps_made(values["step"]) is None:
        found.append(f"step of {name}: no number of steps")
    return found


def _names(groups: Any) -> list[Any] | None:
    """The parameters' names of each group; None for what are no groups."""
    if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
        return None
    return [group.get("param_names") for group in groups]


def _moment(value: Any) -> torch.Tensor:
    """float32 in memory of its own, and in the parameter's order: what steps fused pairs them as they lie."""
    return torch.as_tensor(value).to(torch.float32, memory_format=torch.contiguous_format, copy=True)
