"""The command ``distrust train``. Its flags, their groups and their help come from :mod:`distrust.config`."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from dataclasses import Field, field, fields, make_dataclass, replace
from typing import Annotated, Any, get_type_hints

import tyro

from distrust.checkpoint.remote.location import require_path
from distrust.cli import COMMANDS
from distrust.cli.launch import Launch, end_with_agent, launch
from distrust.config import TrainConfig, key, option_docs, option_groups
from distrust.config_text import from_toml
from distrust.errors import ConfigError
from distrust.options import read_docs

_DESCRIPTION = (
    "Run the same command, or --resume RUN, to resume a run that was killed, stopped or interrupted: the "
    "result is bit-identical. Without options, it trains the bundled model on the bundled corpus. Options "
    "come from --config FILE (TOML: key = value, with underscores) and from flags; flags take precedence."
)
_EXAMPLES = (
    "distrust train",
    "distrust train --model ./my-model --data examples.jsonl --out runs/first --max-steps 500",
    "distrust train --engine mlx --model ./my-model --data examples.jsonl --out runs/first",
    "distrust train --config run.toml --learning-rate 1e-4",
    "distrust train --resume runs/first",
    "distrust train --out runs/first --from-step 200 --branch runs/second --max-steps 300",
    "distrust train --nproc gpu --gradient-accumulation 8 --max-restarts 3",
    "distrust train --nproc 8 --nnodes 2 --rendezvous node-1:29500 --gradient-accumulation 16",
)
_CONFIG = tyro.conf.arg(help="TOML file with options.", help_behavior_hint="")
_RESUME = tyro.conf.arg(help="Folder of a run to continue, with its options.", help_behavior_hint="")
_HINTS = get_type_hints(TrainConfig) | get_type_hints(Launch)


def main(arguments: list[str]) -> int:
    """Train, or resume a run."""
    flags, config = _parse(arguments)
    if flags.starts_ranks:
        return launch(flags, config, arguments)
    end_with_agent()
    # Only now that the flags are known to be right: torch and transformers take seconds to load.
    from distrust.trainer import DistrustTrainer

    ended = DistrustTrainer(config).train()
    return 0 if ended.signal is None else 128 + ended.signal  # as the shell reports a signal


def parse(arguments: list[str]) -> TrainConfig:
    """The config from a TOML file and from flags.

    Raises:
        ConfigError: a value is invalid.
        SystemExit: a flag is unknown, or --help was given.
    """
    return _parse(arguments)[1]


def _parse(arguments: list[str]) -> tuple[Launch, TrainConfig]:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", action="append", default=[])  # to notice a second one
    first.add_argument("--resume", action="append", default=[])
    parsed = first.parse_known_args(arguments)[0]
    if len(parsed.config + parsed.resume) > 1:
        raise ConfigError("--config and --resume: give one of them, once")
    base = TrainConfig()  # the defaults of the flags
    if parsed.config:
        base = from_toml(require_path(parsed.config[0], "--config"))
    if parsed.resume:
        from distrust.engines import config_of_run  # late: only this needs the reader of checkpoints

        base = config_of_run(*parsed.resume)
    command = tyro.cli(
        tyro.conf.OmitArgPrefixes[_command(base)],
        args=arguments,
        prog="distrust train",
        description=_description(),
        config=(tyro.conf.DisallowNone,),  # rejects "--max-steps None"
    )
    groups = [getattr(command, title) for title in option_groups()]  # flat again
    values = {name: value for group in groups for name, value in vars(group).items()}
    flags = Launch(**{option.name: values.pop(option.name) for option in fields(Launch)})
    config = TrainConfig(**values)
    if not parsed.resume:
        return flags, config
    if (config.out, config.branch) != (base.out, base.branch):
        raise ConfigError("--resume names the folder of the run; give it without --out and --branch")
    if config.epochs != base.epochs and config.max_steps == base.max_steps:
        config = replace(config, max_steps=None)  # the steps that the flag asks for
    return flags, config


def _command(base: TrainConfig) -> Any:
    """A dataclass with a field for each group of options, whose defaults are those of a config."""
    members: list[tuple[str, Any, Any]] = [
        ("config", Annotated[str | None, _CONFIG], None),
        ("resume", Annotated[str | None, _RESUME], None),
    ]
    groups = option_groups()
    groups["Processes"][:0] = fields(Launch)
    for title, options in groups.items():
        group = make_dataclass(title, [_flag(option) for option in options], frozen=True)
        default = group(**{option.name: getattr(base, option.name, option.default) for option in options})
        members.append((title, Annotated[group, tyro.conf.arg(name=title, help="")], field(default=default)))
    return make_dataclass("Command", members, frozen=True)


def _flag(option: Field[Any]) -> tuple[str, Any, Any]:
    # The documentation says what None stands for: the help must not add "(default: None)".
    hint = "" if option.default is None else None
    text = (option_docs() | read_docs(Launch))[option.name]
    arg = tyro.conf.arg(name=key(option.name), help=text, help_behavior_hint=hint)
    return option.name, Annotated[_HINTS[option.name], arg], field(default=option.default)


def _description() -> str:
    # Indented lines: tyro joins the others, and does not wrap the result.
    width = shutil.get_terminal_size().columns
    paragraph = textwrap.fill(_DESCRIPTION, width, initial_indent="  ", subsequent_indent="  ")
    purpose = f"{COMMANDS['train'][0].upper()}{COMMANDS['train'][1:]}."
    examples = "\n".join(f"  {example}" for example in _EXAMPLES)  # indented: tyro keeps their lines
    return f"{purpose}\n{paragraph}\n\nexamples:\n{examples}"
