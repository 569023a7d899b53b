"""The command ``distrust generate``: text from a trained model."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from distrust.cli import targets
from distrust.cli.arguments import NEWEST_INTACT, add_checkpoint_options, attributes, parser, print_json
from distrust.errors import ConfigError, DataError
from distrust.option_values import MAX_RECORD_BYTES

if TYPE_CHECKING:
    from distrust.contract import Engine


def main(arguments: list[str]) -> int:
    """Continue prompts with a trained model."""
    options = _options(arguments)
    _require_valid(options)
    targets.checks(options.target)  # a misspelt name fails before the slow imports below
    prompts = options.prompt or _read_prompts()  # flags take precedence
    if not prompts:
        raise DataError("no prompt: give --prompt TEXT, or lines on standard input")
    _require_utf8(prompts)

    from distrust import engines

    sampling = attributes(options, "chat", "max_new_tokens", "temperature", "top_p", "seed")

    def generate(engine: Engine) -> list[str]:
        return [engines.generate(engine, prompt, **sampling) for prompt in prompts]

    device = attributes(options, "device")
    engine, file = engines.open_checkpoint(
        options.target, step=options.step, best=options.best, model=options.model, changes=device
    )
    columns = {"checkpoint": generate(engine)}
    if options.compare:
        del engine  # one model in memory at a time
        base = engines.create_engine(replace(engines.config_of(file, model=options.model), **device))
        columns = {"base": generate(base), **columns}  # the base model first

    names = ("prompt", *columns)
    rows = [dict(zip(names, row, strict=True)) for row in zip(prompts, *columns.values(), strict=True)]
    if options.json:
        print_json(rows)
        return 0
    for row in rows:
        print(row["prompt"])  # the prompt is the user's own
        for name in columns:
            print(f"  {f'{name}: ' if options.compare else ''}{row[name]}")
    return 0


def _require_valid(options: argparse.Namespace) -> None:
    if options.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens is {options.max_new_tokens}: give 1 or more")
    if not 0 <= options.temperature < float("inf"):  # also rejects NaN
        raise ConfigError(f"--temperature is {options.temperature}: give 0 or more")
    if options.top_p is None:
        return
    if not 0 < options.top_p <= 1:  # also rejects NaN
        raise ConfigError(f"--top-p is {options.top_p}: give more than 0, up to 1")
    if not options.temperature:
        raise ConfigError("--top-p has no effect without sampling: also give a --temperature above 0")


def _read_prompts() -> list[str]:
    if sys.stdin.isatty():  # else lines come from a pipe or a file
        print("prompts, one per line; Ctrl-D ends them:", file=sys.stderr)
    # Keep invalid bytes as surrogates: _require_utf8 then names the line.
    sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    prompts = []
    for number, line in enumerate(iter(partial(sys.stdin.readline, MAX_RECORD_BYTES + 1), ""), 1):
        if len(line) > MAX_RECORD_BYTES:
            raise DataError(f"prompt {number}: takes more than {MAX_RECORD_BYTES:,} bytes; shorten it")
        prompts.append(line.rstrip("\n"))
    return prompts


def _require_utf8(prompts: list[str]) -> None:
    for number, prompt in enumerate(prompts, 1):
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise DataError(f"prompt {number}: not UTF-8") from None


def _options(arguments: list[str]) -> argparse.Namespace:
    arg = parser(
        "generate",
        description="Continues each --prompt, or without one each line of standard input.",
        examples=[
            'distrust generate runs/train --prompt "The melting point of"',
            'distrust generate runs/train --compare --prompt "Question: who? Answer:"',
            'distrust generate --checkpoint runs/train/checkpoints/checkpoint-50.safetensors --prompt "It"',
            'distrust generate runs/train --best --chat --temperature 0.7 --prompt "Where is it?"',
            "distrust generate runs/train --json < prompts.txt",
        ],
    )
    arg.add_argument("run", type=targets.target, nargs="?", help=NEWEST_INTACT)
    arg.add_argument("--checkpoint", type=targets.target, metavar="PATH", help="same as RUN")
    add_checkpoint_options(arg, device=True)
    arg.add_argument("--prompt", action="append", help="text to continue; may be repeated")
    arg.add_argument("--chat", action="store_true", help="answer each prompt as a user's message")
    arg.add_argument("--compare", action="store_true", help="also show the base model's text")
    arg.add_argument("--max-new-tokens", type=int, default=64, help="default: 64")
    arg.add_argument("--temperature", type=float, default=0.0, help="0, the default, does not sample")
    arg.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="sample from the smallest set of tokens whose probabilities sum to P",
    )
    arg.add_argument("--seed", type=int, default=0, help="seed of the sampling; default: 0")
    arg.add_argument("--json", action="store_true", help="print a list of objects")
    options = arg.parse_args(arguments)
    if (options.run is None) == (options.checkpoint is None):
        arg.error("give either a run or --checkpoint PATH")
    options.target = options.run or options.checkpoint
    return options
