"""The command ``distrust``: one module per verb, each a thin layer over the library.

A command pays only for its own imports: this module imports nothing heavy, and a verb's module is imported
once the verb is known. Exit codes: 0; 1 for a failure or a negative result; 2 for wrong usage; 128 + signal.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from distrust.errors import DistrustError, DistrustWarning, MissingDependency, printable

#: The verbs and what they do. Each has a module of its name.
COMMANDS = {
    "demo": "train the bundled model twice and show what the weighting changes",
    "train": "train a model, or resume a run",
    "preview": "show what of the data is trained: rendered text, tokens, weight",
    "weigh": "compute or check the provenance of data, and show its weights",
    "generate": "generate text with a trained model",
    "eval": "evaluate a trained model on data, by source class",
    "export": "export a trained model for peft, mlx-lm or transformers, or its tensors",
    "convert": "import checkpoints of other programs",
    "ls": "list checkpoints, or the runs in a folder",
    "show": "show the contents of a checkpoint",
    "verify": "verify every byte of checkpoints",
    "prune": "remove superseded or damaged checkpoints",
    "rescue": "list or save the last steps of processes that died, from shared memory",
    "diff": "compare two checkpoints",
    "copy": "copy runs or checkpoints to or from a store",
    "plot": "plot runs: losses, learning rate, weights, stall, memory",
    "report": "write an HTML page about a run: state, figures, provenance, checkpoints, options",
}
#: These may be inside native code for long. The others read checkpoints, whose parsers are bounded.
_READS_DATA_OR_MODELS = ("demo", "train", "preview", "weigh", "generate", "eval", "export", "convert")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # characters outside its encoding must not fail a command
        sys.stdout.reconfigure(errors="backslashreplace")  # as in an ASCII locale
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if arguments else 2  # no command is wrong usage
    if arguments[0] == "--version":
        from distrust import __version__  # late, like every import of a command

        print(f"distrust {__version__}")
        return 0
    verb = arguments[0]
    if verb not in COMMANDS:
        import difflib

        similar = difflib.get_close_matches(verb, COMMANDS, n=1)
        hint = f"did you mean {similar[0]}?" if similar else f"there are {', '.join(COMMANDS)}"
        return _print_error(f"no command {verb!r}; {hint}", 2)
    with warnings.catch_warnings():
        # Warnings of libraries are for programmers. Those of this package are for users, one line each.
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", DistrustWarning)  # also repeated ones
        # Except those of torch about determinism: the run may not be bit-identical.
        warnings.filterwarnings("once", message=".*determin")
        warnings.showwarning = _show_warning  # one line, without file and line number
        with _watchdog(verb):
            return _run(verb, arguments[1:])


def _watchdog(verb: str) -> contextlib.AbstractContextManager[None]:
    if verb not in _READS_DATA_OR_MODELS:
        return contextlib.nullcontext()
    from distrust.cli.watchdog import Watchdog

    return Watchdog()


def _run(verb: str, arguments: list[str]) -> int:
    try:
        code: int = import_module(f"distrust.cli.{verb}").main(arguments)
        sys.stdout.flush()  # a broken pipe must fail here, not at exit
        return code
    except DistrustError as error:
        return _print_error(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("distrust"):  # a bug, not a missing library
            raise
        missing = MissingDependency(f"distrust {verb}", library=error.name or str(error), extra="train")
        return _print_error(str(missing), 1)
    except KeyboardInterrupt:
        _print_error("interrupted", 130)
        os._exit(130)  # at once, without waiting for a write: an unfinished checkpoint is never visible
    except BrokenPipeError:
        # The reader (head, less) has exited. Without this, Python's flush at exit would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE
    except OSError as error:
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        return _print_error(printable(f"{verb}: {where}{error.strerror or error}"), 1)


def _help() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {verb:{width}}  {purpose}" for verb, purpose in COMMANDS.items())
    return f"""usage: distrust COMMAND ...

Fine-tunes language models, weighs every example by the provenance of its source,
and never loses a run.

commands:
{commands}

examples:
  distrust demo
  distrust train --model ./my-model --data examples.jsonl --out runs/first
  distrust ls runs/first

distrust COMMAND --help explains a command; distrust --version prints the version."""


def _print_error(message: str, code: int) -> int:
    sys.stdout.flush()
    print(f"distrust: {printable(message, lines=True)}", file=sys.stderr)
    return code


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    is_ours = isinstance(message, DistrustWarning)  # has a line for each finding
    print(f"distrust: warning: {printable(str(message), lines=is_ours)}", file=sys.stderr)
