"""Whether a checkpoint continues the run that a config asks for: pure comparisons, told all at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, Final

from distrust.config import TrainConfig, flag, key
from distrust.errors import ResumeRefused

FINGERPRINTS = "fingerprints"
#: Options that a run settles when it begins: left out later, they stay what they were.
FIXED_AT_START = ("max_length", "schedule_steps")
#: What runs were before there was an option, where that is not its default.
BEFORE_THE_OPTION = {"clipping": "plain"}

#: The one that runs were trained with before their environment named it.
FIRST_ENGINE: Final = "torch"


def merge_saved_options(config: TrainConfig, saved: Mapping[str, Any], *, where: str) -> TrainConfig:
    """The config, with what it leaves open taken from the checkpoint.

    Args:
        config: what the user asks for.
        saved: the ``config`` section of the checkpoint: option -> value.
        where: the run, for the message.

    Raises:
        ResumeRefused: a line for each option that would change the mathematics.
    """
    taken = {}
    differences = []
    for option in fields(config):
        name = key(option.name)
        if option.metadata["effect"] != "result":
            continue
        # An option that is younger than the run was at its default, as a rule.
        value = getattr(config, option.name)
        was = saved.get(name, BEFORE_THE_OPTION.get(name, option.default))
        if value is None and option.name in FIXED_AT_START:
            taken[option.name] = was
        elif value != was:
            differences.append(f"{flag(option.name)} was {_shown(was)}, is {_shown(value)}")
    if differences:
        raise _refusal(where, differences)
    return replace(config, **taken)


def require_same_fingerprints(
    current: Mapping[str, str],
    saved: Mapping[str, Any],
    *,
    config: TrainConfig,
    where: str,
    known_only: bool = False,
) -> None:
    """Refuse to go on with other data, or on another base model.

    Args:
        current: what it is now, by option.
        saved: the ``config`` section of the checkpoint.
        config: names both.
        where: the run, for the message.
        known_only: whether a fingerprint that is missing there is not known, and not another one.

    Raises:
        ResumeRefused: a line for each that differs.
    """
    was = saved.get(FINGERPRINTS, {})
    differences = [
        f"{flag(name)} {_shown(getattr(config, name))}: its content is not that of the run "
        f"(was {str(was.get(name))[:12]}, is {digest[:12]})"
        for name, digest in current.items()
        if was.get(name) != digest and not (known_only and name not in was)
    ]
    if differences:
        raise _refusal(where, differences)


def environment_differences(
    current: Mapping[str, Any], recorded: Mapping[str, Any], *, quantized: bool
) -> list[str]:
    """What may change the last bits: a line for each thing that differs.

    Args:
        current: what it is now, by name.
        recorded: what it was.
        quantized: whether the engine rounds the base model.
    """
    engine, was = current.get("engine"), recorded.get("engine", FIRST_ENGINE)
    if recorded and engine is not None and engine != was:
        return [
            f"the run was trained with --engine {was}, and goes on with {engine}. Weights, moments and the "
            "number of steps are taken over; the states of random generators are not, each step seeds its own"
            + ("; the quantized base is rounded in another way" if quantized else "")
        ]
    return [
        f"{name} was {_shown(recorded[name])}, is {_shown(value)}"
        for name, value in current.items()
        if name in recorded and recorded[name] != value
    ]


def _refusal(where: str, differences: list[str]) -> ResumeRefused:
    lines = "".join(f"\n  {line}" for line in differences)
    return ResumeRefused(
        f"{where}: this would not continue the run that is there:{lines}\n"
        "give the options of that run, or another --out",
        differences,
    )


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
