"""The command ``distrust generate``."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from distrust.checkpoint.store import newest
from distrust.cli.arguments import TARGET, parser, print_json
from distrust.errors import ConfigError, DataError

if TYPE_CHECKING:
    from distrust.training.engine import Engine


def main(arguments: list[str]) -> int:
    """Let a trained model go on with prompts."""
    options = _options(arguments)
    if options.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens is {options.max_new_tokens}: give 1 or more")
    if not 0 <= options.temperature < float("inf"):
        raise ConfigError(f"--temperature is {options.temperature}: give 0 or more")
    file = newest(options.target)  # a wrong name is told before the frameworks are loaded
    prompts = options.prompt or _lines()
    if not prompts:
        raise DataError("no prompt: give --prompt TEXT, or lines on the standard input")
    _require_utf8(prompts)

    from distrust import engines
    from distrust.engines.torch.engine import TorchEngine
    from distrust.engines.torch.generation import generate

    def write(engine: Engine) -> list[str]:
        assert isinstance(engine, TorchEngine)  # noqa: S101 - the only engine there is
        return [
            generate(
                engine,
                prompt,
                max_new_tokens=options.max_new_tokens,
                temperature=options.temperature,
                seed=options.seed,
            )
            for prompt in prompts
        ]

    columns = {}
    if options.compare:
        config = engines.config_of(file)
        columns["base"] = write(engines.create(replace(config, model=options.model or config.model)))
    trained, _ = engines.open_checkpoint(file.path, model=options.model)
    columns["checkpoint"] = write(trained)

    rows = [
        {"prompt": prompt, **{name: texts[index] for name, texts in columns.items()}}
        for index, prompt in enumerate(prompts)
    ]
    if options.json:
        print_json(rows)
        return 0
    for row in rows:
        print(row["prompt"])
        for name in columns:
            print(f"  {f'{name}: ' if options.compare else ''}{row[name]}")
    return 0


def _lines() -> list[str]:
    if sys.stdin.isatty():
        print("prompts, one a line; Ctrl-D ends them:", file=sys.stderr)
    sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]  # told by line, below
    return [line.rstrip("\n") for line in sys.stdin]


def _require_utf8(prompts: list[str]) -> None:
    for number, prompt in enumerate(prompts, 1):
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise DataError(f"prompt {number}: not UTF-8") from None


def _options(arguments: list[str]) -> argparse.Namespace:
    arg = parser(
        "generate",
        description="Each --prompt is gone on with; without one, each line of the standard input.",
        examples=[
            'distrust generate runs/train --prompt "The melting point of"',
            'distrust generate runs/train --compare --prompt "Question: who? Answer:"',
            "distrust generate runs/train --json < prompts.txt",
        ],
    )
    arg.add_argument("target", type=Path, help=f"{TARGET}; of several, the newest")
    arg.add_argument("--prompt", action="append", help="text to go on with; may be given again")
    arg.add_argument("--compare", action="store_true", help="show the base model's text beside it")
    arg.add_argument("--model", help="where the base model lies now, if it was moved")
    arg.add_argument("--max-new-tokens", type=int, default=64, help="default: 64")
    arg.add_argument("--temperature", type=float, default=0.0, help="0, the default, draws nothing")
    arg.add_argument("--seed", type=int, default=0, help="of the drawing; default: 0")
    arg.add_argument("--json", action="store_true", help="print a list of objects")
    return arg.parse_args(arguments)
