"""What the commands on files have in common: their parser, and how they print."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from distrust.cli import COMMANDS
from distrust.reporting.display import printable

TARGET = "a run, a directory of checkpoints, or one checkpoint"


def parser(verb: str, *, description: str, examples: Sequence[str]) -> argparse.ArgumentParser:
    """A parser whose help ends with examples."""
    return argparse.ArgumentParser(
        prog=f"distrust {verb}",
        description=f"{COMMANDS[verb][0].upper()}{COMMANDS[verb][1:]}. {description}",
        epilog="examples:\n" + "\n".join(f"  {example}" for example in examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_choice_of_checkpoint(arg: argparse.ArgumentParser) -> None:
    """The options that say which checkpoint of a run is opened, and on which base model."""
    which = arg.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="this step of a run instead of the newest")
    which.add_argument("--best", action="store_true", help="the best one, by the metric of the run")
    arg.add_argument("--model", help="where the base model lies now, if it was moved")


def print_json(value: Any) -> None:
    """JSON that any reader takes: NaN and infinities, which JSON has no words for, become strings."""
    print(printable(json.dumps(_plain(value), indent=2, ensure_ascii=False), lines=True))


def _plain(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
