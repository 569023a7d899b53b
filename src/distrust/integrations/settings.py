"""What a checkpoint was made with, against what the program has now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distrust.errors import ResumeRefused, join_first


def refuse_differences(step: int, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raise ResumeRefused, with the name and both values of each setting that differs."""
    names = [name for name in {**current, **saved} if saved.get(name) != current.get(name)]
    lines = [f"{name} was {saved.get(name)!r} and is now {current.get(name)!r}" for name in names]
    if lines:
        text = f"the checkpoint of step {step} is of another run: {join_first(lines, 3)}"
        raise ResumeRefused(f"{text}. Undo this, or start a new run", lines)
