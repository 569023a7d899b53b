"""The frameworks that can train, each an implementation of :mod:`distrust.contract`.

registry.py          name -> what an engine needs, and how it is created
from_checkpoint.py   checkpoint -> its config, or an engine with its weights
generation.py        prompt -> text
loading.py           name of a base model -> where it is, its tokenizer and chat template, its digests
state_conversion.py  the state of one engine <-> that of the other
runtime.py           what both engines share at run time
torch/, mlx/         the engines, with the same file names for the same duties

Importing this package loads no framework. The two engines do not import each other.
"""

from distrust.engines.from_checkpoint import (
    base_model_errors,
    config_of,
    config_of_run,
    engine_of,
    fingerprint_of,
    open_checkpoint,
    read_checkpoint,
    recorded_config,
    written_config,
)
from distrust.engines.generation import generate
from distrust.engines.loading import read_chat_template
from distrust.engines.registry import (
    EngineName,
    create_engine,
    is_installed,
    join_ranks,
    recorded_engine,
    require_installed,
    select_engine,
)

__all__ = [
    "EngineName",
    "base_model_errors",
    "config_of",
    "config_of_run",
    "create_engine",
    "engine_of",
    "fingerprint_of",
    "generate",
    "is_installed",
    "join_ranks",
    "open_checkpoint",
    "read_chat_template",
    "read_checkpoint",
    "recorded_config",
    "recorded_engine",
    "require_installed",
    "select_engine",
    "written_config",
]
