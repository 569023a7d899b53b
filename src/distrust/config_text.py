"""Options as text: TOML files, among them the one in the folder of a run, and the words of a command."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from distrust.atomic import atomic_file
from distrust.checkpoint.remote.location import is_url
from distrust.config import TrainConfig, flag, key
from distrust.errors import ConfigError, shorten, warn
from distrust.option_values import BUNDLED
from distrust.options import read_toml, suggest_name, to_toml

#: The file in the folder of a run that holds its options.
RUN_CONFIG = "config.toml"
#: Its first line. A file without it is the user's own.
_MARK = b"# Written by distrust train, and replaced when the run resumes. Without this line it is kept.\n"
#: Options that may be paths.
_PATHS = ("model", "data", "eval_data", "cache_dir", "out", "branch", "from_", "mirror")


def from_mapping(values: Mapping[str, Any], *, where: str) -> TrainConfig:
    """A config from the keys of the file ``where``, a TOML file or a checkpoint; missing ones get defaults.

    Raises:
        ConfigError: naming every unknown key, with the nearest known one, and every value of a wrong type.
    """
    names = {key(option.name): option.name for option in fields(TrainConfig)}
    problems, arguments = [], {}
    for option, value in values.items():
        if isinstance(value, dict):
            problems.append(f"{where}: [{option}] is a table; options must be top-level keys: key = value")
        elif option not in names:
            problems.append(f"{where}: unknown option {shorten(repr(option))}{suggest_name(option, names)}")
        else:
            arguments[names[option]] = value
    try:
        config = TrainConfig(**arguments)
    except ConfigError as error:
        problems += [f"{where}: {line}" for line in str(error).splitlines()]
    if problems:
        raise ConfigError(problems)
    return config


def is_template(value: str) -> bool:
    """Whether a value of ``chat_template`` is the text of a template, as checkpoints have it, not a name."""
    return "{{" in value or "{%" in value


def from_toml(path: Path, *, flag: str = "--config") -> TrainConfig:
    """A config from a TOML file that was given with a flag.

    Raises:
        ConfigError: the file cannot be read, or :func:`from_mapping` refuses its content.
    """
    return from_mapping(read_toml(path, flag), where=str(path))


def write_options(config: TrainConfig) -> None:
    """Write the options that differ from their defaults into the folder of the run, which exists.

    Local files and folders get absolute paths, so that the run can be resumed from any folder. A file of that
    name that the user wrote is kept.

    Raises:
        WriteFailed: the file cannot be written; the one before it is unchanged.
    """
    config = replace(config, **{name: _absolute(getattr(config, name)) for name in _PATHS})
    config = replace(config, take_over=False)  # true of one start only
    if config.branch is None:  # the run has begun, and continues from its newest checkpoint
        config = replace(config, from_step=None)
    try:
        text = _MARK + to_toml({**config.non_default(), "out": _absolute(config.out)}).encode()
    except UnicodeEncodeError:  # the bytes of a name are no text
        warn(f"{RUN_CONFIG} is not written, because an option is not valid UTF-8: --resume will not work")
        return
    path = config.run_directory / RUN_CONFIG
    previous = path.read_bytes() if path.is_file() else b""
    if previous and not previous.startswith(_MARK):
        warn(f"{path}: is kept, because you wrote it; --resume takes the options from it")
    elif previous != text:
        with atomic_file(path, force=True) as file:
            file.write(text)


def _absolute(names: Any) -> Any:
    if isinstance(names, tuple):
        return tuple(map(_absolute, names))
    is_path = names is not None and names != BUNDLED and not is_url(names) and os.path.lexists(names)
    return os.path.abspath(names) if is_path else names


def to_words(name: str, value: Any) -> list[str]:
    """An option as typed on the command line."""
    if type(value) is bool:
        return [flag(name) if value else flag(name).replace("--", "--no-", 1)]
    return [flag(name), *map(_to_word, value if type(value) in (list, tuple) else [value])]


def _to_word(value: Any) -> str:
    # The short form only if it is exact.
    return f"{value:g}" if type(value) is float and float(f"{value:g}") == value else str(value)
