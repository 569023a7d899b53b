"""The command ``distrust train``."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import tyro

from distrust import config as options
from distrust.cli import COMMANDS
from distrust.config import TrainConfig
from distrust.errors import ConfigError

DESCRIPTION = """{what}.

The same command continues a run that was killed, stopped or interrupted, bit for bit. Without options it
trains the bundled model on the bundled corpus. Options come from --config FILE (TOML: key = value, with
underscores) and from flags; flags win.

examples:
  distrust train
  distrust train --model ./my-model --data examples.jsonl --out runs/first --max-steps 500
  distrust train --engine mlx --model ./my-model --data examples.jsonl --out runs/first
  distrust train --config run.toml --learning-rate 1e-4
  distrust train --out runs/first --from-step 200 --branch runs/second --max-steps 300"""


@dataclass(frozen=True, kw_only=True)
class _Flags(TrainConfig):
    config: str | None = None
    """TOML file with options."""
    lambda_: Annotated[float, tyro.conf.arg(name="lambda")] = TrainConfig.lambda_


#: The same, but that the help does not say "default: None" behind a doc that says what that stands for.
_Command: Any = make_dataclass(
    "_Command",
    [
        (name, Annotated[hint, tyro.conf.arg(help_behavior_hint="")], field(default=None))
        for name, hint in get_type_hints(_Flags, include_extras=True).items()
        if getattr(_Flags, name) is None
    ],
    bases=(_Flags,),
    frozen=True,
    kw_only=True,
)


def main(arguments: list[str]) -> int:
    """Train as the flags say."""
    config = parse(arguments)
    # torch and transformers take seconds to load: not before the flags are known to be right.
    from distrust.reporting.console import ConsoleReporter
    from distrust.reporting.dashboards import create_observers
    from distrust.trainer import DistrustTrainer

    with ConsoleReporter(log_every=config.log_every) as console:
        ended = DistrustTrainer(config, observers=[console, *create_observers(config)]).train()
    return 0 if ended.signal is None else 128 + ended.signal


def parse(arguments: list[str]) -> TrainConfig:
    """The config that a file and flags give together.

    Raises:
        ConfigError: for values that make no sense; SystemExit for flags that do not exist.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", action="append", default=[])
    files = first.parse_known_args(arguments)[0].config
    if len(files) > 1:
        raise ConfigError(f"--config is given {len(files)} times; give one file")
    base = options.from_toml(Path(files[0])) if files else TrainConfig()
    command = tyro.cli(
        _Command,
        args=arguments,
        prog="distrust train",
        description=DESCRIPTION.format(what=f"{COMMANDS['train'][0].upper()}{COMMANDS['train'][1:]}"),
        default=_Command(**_values(base)),
        config=(tyro.conf.DisallowNone,),
    )
    return TrainConfig(**_values(command))


def _values(config: TrainConfig) -> dict[str, Any]:
    return {option.name: getattr(config, option.name) for option in fields(TrainConfig)}
