"""AdamW of torch over named parameters: weight decay for matrices, none for vectors.

Decoupled weight decay: Loshchilov and Hutter 2017, arXiv:1711.05101. The fused kernel makes one pass over
weights, moments and gradients. It does not check shapes, so :func:`list_differences` must come before
:func:`load`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from distrust.config import TrainConfig
from distrust.contract import EngineState
from distrust.engines import state_conversion
from distrust.engines.state_conversion import steps_made

#: Its state of each parameter, besides the number of steps.
MOMENTS = ("exp_avg", "exp_avg_sq")


def make_optimizer(trained: Mapping[str, torch.nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the trained parameters."""
    matrices = [(name, parameter) for name, parameter in trained.items() if parameter.ndim >= 2]
    vectors = [(name, parameter) for name, parameter in trained.items() if parameter.ndim < 2]
    decays = ((matrices, config.weight_decay), (vectors, 0.0))
    groups = [{"params": group, "weight_decay": decay} for group, decay in decays if group]
    betas = config.adam_beta1, config.adam_beta2
    optimizer = torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon, fused=True
    )
    optimizer.register_step_post_hook(_count_change)
    return optimizer


def _count_change(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Tell autograd that the parameters have changed, which the fused kernel does not."""
    for group in optimizer.param_groups:
        torch.autograd.graph.increment_version(group["params"])


@torch.no_grad()
def restore(
    state: EngineState,
    trained: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
    *,
    undivided: Mapping[str, Any] | None = None,
    take: Callable[[Any], torch.Tensor] = torch.as_tensor,
) -> None:
    """Copy a state of either engine into parameters and their optimizer; ResumeRefused changes nothing.

    If they are parts of ``undivided`` ones, ``take`` takes the part of a saved array.
    """
    undivided = undivided or trained
    state = state_conversion.to_torch(state, optimizer.state_dict()["param_groups"])
    differences = state_conversion.list_differences(state.model, undivided)
    differences += list_differences(state.optimizer, optimizer, undivided)
    state_conversion.require_no_differences(differences, state.model)
    for name, parameter in trained.items():
        parameter.copy_(take(state.model[name]))
    load(state.optimizer, optimizer, take)


def list_differences(
    saved: Mapping[str, Any], optimizer: torch.optim.Optimizer, parameters: Mapping[str, Any]
) -> list[str]:
    """One line for each reason why a saved state is not one of this optimizer of ``parameters``, by name.

    Guards the fused kernel, which would read and write beyond moments that are too small.
    """
    # Moments are numbered by the order of the parameters, so the order must be the same, too.
    if _parameter_names(saved["param_groups"]) != _parameter_names(optimizer.param_groups):
        return ["the optimizer's parameters have other names, or another order"]
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    state = saved.get("state")
    if not isinstance(state, Mapping) or not set(state) <= set(range(len(names))):
        return ["the optimizer's moments are of parameters that it does not have"]
    return [
        line
        for number, values in state.items()
        for line in _moment_differences(values, names[number], parameters[names[number]])
    ]


def load(
    saved: Mapping[str, Any], optimizer: torch.optim.Optimizer, take: Callable[[Any], torch.Tensor]
) -> None:
    """Load a saved state for which :func:`list_differences` returned no lines."""
    moments = {
        number: {name: _own_tensor(take(value)) for name, value in values.items()}
        for number, values in saved["state"].items()
    }
    # Of the saved options only the learning rate counts: the others are compared with the run's, and the
    # implementation (fused or not) is this version's choice.
    groups = [
        {**current, "lr": stored["lr"] if type(stored.get("lr")) is float else current["lr"]}
        for current, stored in zip(optimizer.state_dict()["param_groups"], saved["param_groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})


def _moment_differences(values: Any, name: str, parameter: torch.nn.Parameter) -> list[str]:
    if not isinstance(values, Mapping) or values.keys() != {"step", *MOMENTS}:
        return [f"{name}: its moments are not AdamW's"]
    shapes = {moment: getattr(values[moment], "shape", None) for moment in MOMENTS}  # None: not an array
    lines = [
        f"{moment} of {name}: was {shape and list(shape)}, is {list(parameter.shape)}"
        for moment, shape in shapes.items()
        if shape != parameter.shape
    ]
    if steps_made(values["step"]) is None:
        lines.append(f"step of {name}: not a number of steps")
    return lines


def _parameter_names(groups: Any) -> list[Any] | None:
    """Names of the parameters of each group; None for anything but groups."""
    if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
        return None
    return [group.get("param_names") for group in groups]


def _own_tensor(value: Any) -> torch.Tensor:
    """A contiguous float32 copy: the tensors of a checkpoint share one block, which a view would keep alive.

    Contiguous because the fused kernel pairs moments and weights by their order in memory.
    """
    return torch.as_tensor(value).to(torch.float32, memory_format=torch.contiguous_format, copy=True)
