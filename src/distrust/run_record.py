"""What a training checkpoint records about its run, besides arrays.

The only module that knows the keys of a training checkpoint's ``config``, ``metadata`` and ``run`` sections.
``config`` and ``metadata`` enter the state digest; ``run`` may differ between equal runs. Reading trusts
nothing: a value of the wrong type counts as missing. Commands that only list files import this module, so it
imports neither numpy nor the options.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distrust.checkpoint import Checkpoint
    from distrust.checkpoint.foreign import ForeignHeader
    from distrust.checkpoint.header import Header
    from distrust.config import TrainConfig

#: Keys that earlier versions wrote, with their names today.
_OLD_KEYS = {"begun_elsewhere": "imported_from", "not_taken_over": "dropped"}
#: Keys of ``run`` that are not options; each is also a field.
_RUN_KEYS = {
    "corpus", "environment", "elapsed_seconds", "evaluations",
    "continues", "imported_from", "dropped", "converted_from", "model_is_folder", "ranks",
    "integration",
}  # fmt: skip
#: Options that are taken from a checkpoint besides those that change the result. No other one: a checkpoint
#: may be a stranger's, and must not choose where this machine writes, or how much of it is used.
_TAKEN = {
    "model", "data", "split", "subset", "revision", "eval_data", "eval_split", "chat_template", "date",
    "text_column", "prompt_column", "completion_column", "messages_column", "weight_column",
    "authority_weight_column", "provenance_entropy_column", "source_column", "default_weight",
    "default_authority_weight", "default_provenance_entropy", "on_long", "strict", "max_steps", "device",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """What a training checkpoint records about its run."""

    config: Mapping[str, Any]  # options that change the result, by key
    settings: Mapping[str, Any]  # all other options, by key
    fingerprints: Mapping[str, str] = field(default_factory=dict)  # of "data" and "model"; absent if unknown
    tokens_seen: int | None = None  # trained tokens of all steps so far
    corpus: Mapping[str, Any] = field(default_factory=dict)  # "examples" and trained "tokens"
    environment: Mapping[str, Any] = field(default_factory=dict)  # what may change the last bits
    elapsed_seconds: float | None = None  # time spent in steps, over all sessions
    evaluations: Mapping[str, Any] | None = None  # of the BestTracker
    continues: str = ""  # program and step that an imported run began at; empty if it began here
    imported_from: str = ""  # the program that wrote the checkpoint; empty if it is this trainer
    dropped: tuple[str, ...] = ()  # a line for each thing that the import did not keep
    ranks: int = 1  # number of processes that trained together
    model_is_folder: bool = False  # the model was a folder, so its name is never looked up on a hub
    converted_from: str = ""  # path of the file that was converted, relative to the checkpoint's folder
    trained_by: str = ""  # the library whose loop saved it, by distrust.integrations; never saved by a run
    assumed: tuple[str, ...] = ()  # options that an imported checkpoint lacks, as flags; never saved

    @classmethod
    def from_header(cls, header: Header | ForeignHeader) -> RunRecord:
        """The record in the header of a checkpoint of any format."""
        return cls._from_sections(header.config, header.metadata, header.run_info.get("extra"))

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> RunRecord:
        """The record in a loaded checkpoint."""
        return cls._from_sections(checkpoint.config, checkpoint.metadata, checkpoint.run)

    @classmethod
    def _from_sections(cls, config: Mapping[Any, Any], metadata: Mapping[Any, Any], run: Any) -> RunRecord:
        # Values may come from a hostile file: each is checked or ignored.
        extra = {_OLD_KEYS.get(name, name): value for name, value in _mapping(run).items()}
        tokens, digests = metadata.get("tokens_seen"), _mapping(config.get("fingerprints"))
        elapsed, evaluations, dropped = map(extra.get, ("elapsed_seconds", "evaluations", "dropped"))
        ranks = extra.get("ranks")
        return cls(
            config={name: value for name, value in config.items() if name != "fingerprints"},
            settings={name: value for name, value in extra.items() if name not in _RUN_KEYS},
            fingerprints={name: v for name, v in digests.items() if type(v) is str},
            tokens_seen=tokens if type(tokens) is int else None,
            corpus=_mapping(extra.get("corpus")),
            environment=_mapping(extra.get("environment")),
            elapsed_seconds=elapsed if type(elapsed) is float else None,
            evaluations=evaluations if isinstance(evaluations, Mapping) else None,
            continues=_text(extra.get("continues")),
            imported_from=_text(extra.get("imported_from")),
            dropped=tuple(line for line in dropped if type(line) is str) if type(dropped) is list else (),
            converted_from=_text(extra.get("converted_from")),
            ranks=ranks if type(ranks) is int else 1,
            model_is_folder=extra.get("model_is_folder") is True,
            trained_by=_text(_mapping(extra.get("integration")).get("program")),
        )

    def sections(self) -> dict[str, Any]:
        """The sections of a checkpoint that hold the record: arguments of :class:`Checkpoint`."""
        return {
            # These two are hashed into the state digest.
            "config": {**self.config, "fingerprints": dict(self.fingerprints)},
            "metadata": {"tokens_seen": self.tokens_seen},
            "run": {
                **self.settings,
                "corpus": dict(self.corpus),
                "environment": dict(self.environment),
                "elapsed_seconds": self.elapsed_seconds,
                "evaluations": self.evaluations,
                **({"continues": self.continues} if self.continues else {}),
                **({"ranks": self.ranks} if self.ranks > 1 else {}),
                **({"model_is_folder": True} if self.model_is_folder else {}),
            },
        }

    @property
    def options(self) -> dict[str, Any]:
        """All options, by key."""
        return {**self.settings, **self.config}

    @property
    def best_rules(self) -> dict[str, Any]:
        """The options that say which checkpoint of the run is the best one."""
        options = {name: self.settings.get(name) for name in ("metric", "metric_mode")}
        return {name: value for name, value in options.items() if isinstance(value, str)}

    @property
    def engine(self) -> str:
        """Name of the engine that trained; empty if not recorded."""
        return _text(self.environment.get("engine"))

    def train_config(self, *, where: str) -> TrainConfig:
        """What was trained, on what data, and how; ``where`` names the checkpoint in errors.

        Options of the run's machine have their defaults, such as its folders, threads and limits.

        Raises:
            ConfigError: an option has a value that this trainer never writes.
        """
        from distrust.config import TrainConfig, key
        from distrust.config_text import from_mapping, is_template
        from distrust.errors import ConfigError

        result = {key(option.name) for option in fields(TrainConfig) if option.metadata["effect"] == "result"}
        options = {name: v for name, v in self.options.items() if name in result | _TAKEN}
        template = options.get("chat_template")
        if isinstance(template, str) and not is_template(template):  # no file is read for it
            raise ConfigError(f"{where}: chat_template is not the text of a template")
        return from_mapping(options, where=where)


def imported_run(
    program: str, *, dropped: Iterable[str] = (), model: str | None = None, **details: Any
) -> dict[str, Any]:
    """The ``run`` section of a checkpoint that another program or format wrote, with any other details.

    ``dropped`` has a line for each thing that the import does not keep. ``model`` is the base model's name.
    """
    lines = list(dropped)
    return {
        "imported_from": program,
        **({"dropped": lines} if lines else {}),
        **({} if model is None else {"model": model}),
        **details,
    }


def with_conversion_source(run: Mapping[str, Any], path: str) -> dict[str, Any]:
    """A ``run`` section that also records the file that was converted."""
    return {**run, "converted_from": path}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _text(value: Any) -> str:
    return value if type(value) is str else ""
