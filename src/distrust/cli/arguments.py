"""What the commands share: their argument parser, the choice of a checkpoint, and JSON output."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distrust.checkpoint.remote.location import require_path
from distrust.cli import COMMANDS
from distrust.errors import printable
from distrust.reporting.display import to_json

TARGET = "a run, a directory of checkpoints, or one checkpoint: a path or URL"
NEWEST_INTACT = f"{TARGET}; of several, the newest intact one"
_EXAMPLES = "examples:\n"


class _HelpFormatter(argparse.HelpFormatter):
    """Wraps the description to the width of the terminal, and keeps the lines of the examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith(_EXAMPLES) else super()._fill_text(text, width, indent)


class _Parser(argparse.ArgumentParser):
    """Refuses a URL where a path is wanted: for every argument of that type, so that none is forgotten."""

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        if action.type is Path or action.dest == "model":
            require_path(arg_string, "/".join(action.option_strings) or str(action.metavar or action.dest))
        return super()._get_value(action, arg_string)


def parser(verb: str, *, description: str, examples: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of a command. Its help begins with what the command does and ends with examples."""
    return _Parser(
        prog=f"distrust {verb}",
        description=f"{COMMANDS[verb][0].upper()}{COMMANDS[verb][1:]}. {description}",
        epilog=_EXAMPLES + "\n".join(f"  {example}" for example in examples),
        formatter_class=_HelpFormatter,
        allow_abbrev=False,  # an abbreviation may become ambiguous with a later version
    )


def add_checkpoint_options(arg: argparse.ArgumentParser, *, device: bool = False) -> None:
    """Add the options that choose a checkpoint of a run, its base model, and, if asked to, a device."""
    choice = arg.add_mutually_exclusive_group()
    choice.add_argument("--step", type=int, help="the checkpoint of this step; default: the newest")
    choice.add_argument("--best", action="store_true", help="the best checkpoint, by the metric of the run")
    arg.add_argument("--model", help="folder or hub name of the base model, if it was moved")
    if device:
        arg.add_argument("--device", default="auto", help="as for distrust train, whatever the run has")


def print_json(value: Any) -> None:
    """Print standard JSON: NaN and infinities, which it lacks, become strings."""
    print(printable(json.dumps(to_json(value), indent=2, ensure_ascii=False), lines=True))


def attributes(value: object, *names: str) -> dict[str, Any]:
    """Some attributes of an object, for :func:`print_json`."""
    return {name: getattr(value, name) for name in names}
