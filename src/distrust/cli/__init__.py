"""The command ``distrust``: one file a verb, each a few lines over the library.

A command pays only for its own imports: the verb's module is imported once the verb is known, and this file
imports nothing heavy. Exit codes: 0, 1 (found wrong, or failed), 2 (bad usage), 128 + signal.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from distrust.errors import ConfigError, DistrustError, DistrustWarning
from distrust.reporting.display import printable

#: Each verb and what it does; its module has the verb's name.
COMMANDS = {
    "demo": "train the bundled model twice and show what the weighting does",
    "train": "train, or go on with a run",
    "weigh": "compute or check what sources are worth, and show what the data weighs",
    "generate": "let a trained model write",
    "eval": "the losses of a trained model on data, by source class",
    "export": "write what was trained as an adapter of peft or mlx-lm, a whole model, or its tensors alone",
    "convert": "write checkpoints of other programs as ours",
    "ls": "list checkpoints",
    "show": "what one checkpoint holds",
    "verify": "check every byte of checkpoints",
    "prune": "remove checkpoints: superseded ones, or damaged ones",
    "diff": "what differs between two checkpoints",
    "plot": "draw how runs go: losses, learning rate, weights, stall, memory",
    "report": "one page on a run: its state, pictures, provenance, checkpoints, options",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # what it has no letters for is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from distrust import __version__

        print(f"distrust {__version__}")
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in COMMANDS:
        import difflib

        close = difflib.get_close_matches(verb, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(COMMANDS)}"
        return _complain(f"no command {verb!r}; {hint}", 2)
    with warnings.catch_warnings():
        # A library's remarks to programmers are not for the user; ours are, one line each.
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", DistrustWarning)
        # But this one says that a run may not be bit-identical.
        warnings.filterwarnings("once", message=".*does not have a deterministic implementation")
        warnings.showwarning = _show_warning
        return _run(verb, rest)


def _run(verb: str, arguments: list[str]) -> int:
    try:
        code: int = import_module(f"distrust.cli.{verb}").main(arguments)
        sys.stdout.flush()
        return code
    except ConfigError as error:
        return _complain(str(error), 2)
    except DistrustError as error:
        return _complain(str(error), 1)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("distrust"):
            raise
        return _complain(f"{verb} needs {error.name}: pip install 'distrust-trainer[train]'", 1)
    except KeyboardInterrupt:
        _complain("interrupted", 130)
        os._exit(130)  # at once: not even a write under way is waited for, and none is damaged by that
    except BrokenPipeError:
        # The reader (head, less) has what it wanted. Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        return _complain(f"{verb}: {where}{error.strerror or error}", 1)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {verb:{width}}  {what}" for verb, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: distrust COMMAND ...",
            "",
            "Fine-tunes language models, weighs every example by the provenance of its source,",
            "and never loses a run.",
            "",
            "commands:",
            *lines,
            "",
            "examples:",
            "  distrust demo",
            "  distrust train --model ./my-model --data examples.jsonl --out runs/first",
            "  distrust ls runs/first",
            "",
            "distrust COMMAND --help says more of each; distrust --version says which this is.",
        ]
    )


def _complain(message: str, code: int) -> int:
    sys.stdout.flush()
    print(f"distrust: {printable(message, lines=True)}", file=sys.stderr)
    return code


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"distrust: warning: {printable(str(message), lines=True)}", file=sys.stderr)
