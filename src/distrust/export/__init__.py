"""Exports a checkpoint in the formats that other programs load.

- ``adapter``: an adapter folder of peft, bit-identical to what was trained, without the base model.
- ``mlx``: the same for mlx-lm. Runs of either engine can be exported as either.
- ``merged``: a full model folder of transformers, with the adapter merged into the weights.
- ``state``: the trained tensors alone, in one safetensors file.

Every byte of the checkpoint is verified first. Problems with the base model are found before anything is
written, and the target appears completely or not at all (``atomic.py``). The README.md of a folder records
its origin (``card.py``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from distrust import engines
from distrust.atomic import atomic_directory, require_free
from distrust.checkpoint.remote.location import Location, parse_target, require_path
from distrust.config import TrainConfig
from distrust.engines import state_conversion
from distrust.engines.loading import reference
from distrust.errors import ConfigError
from distrust.export.card import facts_of, model_card, public_name
from distrust.option_values import ExportDtype, ExportFormat

if TYPE_CHECKING:
    from distrust.checkpoint import Checkpoint, CheckpointFile
    from distrust.checkpoint.disk import Disk

Write = Callable[[Path], None]

CARD = "README.md"
STATE_SUFFIX = ".safetensors"
#: The file names that mlx-lm loads.
_MLX_CONFIG, _MLX_WEIGHTS = "adapter_config.json", "adapters.safetensors"
_CHAT_TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True, slots=True)
class ExportResult:
    """The result of an export."""

    path: Path  # the folder, or the file of a ``state``
    format: ExportFormat
    dtype: ExportDtype  # of the weights
    bytes: int  # total size of the files
    checkpoint: Path  # the exported file
    step: int  # of the checkpoint
    state_digest: str  # of the checkpoint


def export(
    target: str | os.PathLike[str] | Location,
    to: str | os.PathLike[str],
    *,
    format: ExportFormat | None = None,  # noqa: A002 - the usual word
    step: int | None = None,
    best: bool = False,
    model: str | None = None,
    dtype: ExportDtype | None = None,
    disk: Disk | None = None,
) -> ExportResult:
    """Export a checkpoint.

    Args:
        target: a run, a directory of checkpoints, or a file; of several, the newest intact one.
        to: the new folder; for ``state``, a file that ends in ``.safetensors``.
        format: default: ``adapter``, or ``mlx`` for a run of mlx, or ``merged`` if all weights were trained.
        step: the step of the checkpoint.
        best: whether to take the best checkpoint by the run's own metric.
        model: folder or hub name of the base model, if it was moved.
        dtype: of the weights; default: float32, as they were trained; for ``merged``, that of the run.
        disk: replaces the operating system's sync and rename: a failing one, for tests.

    Raises:
        ExportFailed: something exists at ``to``, or it cannot be written.
        CheckpointError: there is no such checkpoint, or it is damaged.
        ModelError: the base model is needed and cannot be loaded.
        ResumeRefused: it is another base model.
        ConfigError: the run does not have the format, or the weights do not fit the dtype.
    """
    _require_one_of("--format", format, ExportFormat)
    _require_one_of("--dtype", dtype, ExportDtype)
    to = Path(os.path.abspath(require_path(to, "--to")))
    require_free(to)  # before anything slow
    # torch writes every format; without it, the framework of the checkpoint's engine, or any other.
    framework: engines.EngineName | None = "torch" if engines.is_installed("torch") else None
    source = parse_target(target, "target")
    file, checkpoint = engines.read_checkpoint(source, step=step, best=best, framework=framework)
    engines.fingerprint_of(file, "model")  # refuses checkpoints that no training made
    config = engines.recorded_config(file)
    export_format = format or _default_format(config, file)
    _require_possible(export_format, config, file, to)
    if dtype is None:
        dtype = config.dtype if export_format == "merged" and config.dtype != "auto" else "float32"
    base = config.model if model is None else model
    # Everything that can fail because of the model fails here, before anything is written.
    write = _prepare(export_format, file, checkpoint, file_name=to.name, base=base, model=model, dtype=dtype)
    # The folder appears at its name only after the block ends without an error.
    with atomic_directory(to, single_file=export_format == "state", disk=disk) as folder:
        write(folder)
        if export_format != "state":
            facts = facts_of(file, config, title=to.name, base=base, form=export_format, dtype=dtype)
            (folder / CARD).write_text(model_card(facts), encoding="utf-8")
        nbytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return ExportResult(to, export_format, dtype, nbytes, file.path, file.step, file.state_digest)


def _prepare(
    form: ExportFormat,
    file: CheckpointFile,
    checkpoint: Checkpoint,
    *,
    file_name: str,
    base: str,
    model: str | None,
    dtype: ExportDtype,
) -> Write:
    """Prepare everything in memory; returns the function that writes it into a folder."""
    if form == "mlx":
        return _prepare_mlx(file, checkpoint, base, dtype=dtype)
    if form == "state":
        origin = {
            "step": str(file.step),
            "state_digest": file.state_digest,
            "base_model": public_name(base),
            "base_model_fingerprint": engines.fingerprint_of(file, "model"),
        }
        return _prepare_state(checkpoint.model, file_name, origin, dtype=dtype)
    engines.require_installed("torch", purpose=f"--format {form}")
    from distrust.engines.torch.engine import TorchEngine
    from distrust.engines.torch.export import prepare_adapter, prepare_merged, require_mergeable

    config = engines.config_of(file, model=model)
    with engines.base_model_errors(file, config.model, overridden=model is not None):
        if form == "adapter":
            return prepare_adapter(config, state_conversion.arrays_to_torch(checkpoint.model), dtype=dtype)
        require_mergeable(config)  # before the base model is loaded
    # Always on the CPU and with the base model in full precision: the sum is rounded once.
    changes = {"engine": "torch", "device": "cpu", "gradient_checkpointing": False, "quantization": "none"}
    engine = engines.engine_of(file, checkpoint, model=model, changes=changes)
    assert isinstance(engine, TorchEngine)  # noqa: S101 - as requested above
    return prepare_merged(engine, config, dtype=dtype)


def _default_format(config: TrainConfig, file: CheckpointFile) -> ExportFormat:
    if not config.lora_rank:
        return "merged"  # there is no adapter
    return "mlx" if engines.recorded_engine(file) == "mlx" else "adapter"


def _prepare_state(
    tensors: Mapping[str, Any], name: str, about: Mapping[str, str], *, dtype: ExportDtype
) -> Write:
    prepare: Callable[..., Write]
    if engines.is_installed("torch"):
        from distrust.engines.torch.export import prepare_state as prepare
    else:
        from distrust.engines.mlx.adapter import prepare_state as prepare
    return prepare(tensors, file_name=name, about=about, dtype=dtype)


def _prepare_mlx(file: CheckpointFile, checkpoint: Checkpoint, base: str, *, dtype: ExportDtype) -> Write:
    tensors = state_conversion.arrays_to_mlx(checkpoint.model)
    trained = engines.config_of(file)
    config = _mlx_config(trained, tensors, base=reference(base))
    write_weights = _prepare_state(tensors, _MLX_WEIGHTS, {"format": "mlx"}, dtype=dtype)

    def write(folder: Path) -> None:
        write_weights(folder)
        (folder / _MLX_CONFIG).write_text(config, encoding="utf-8")
        if trained.chat_template is not None:  # otherwise the base model has it
            (folder / _CHAT_TEMPLATE).write_text(trained.chat_template, encoding="utf-8")

    return write


def _mlx_config(config: TrainConfig, names: Collection[str], *, base: str) -> str:
    """The text of mlx-lm's ``adapter_config.json`` for arrays of the mlx engine."""
    for name in names:
        if not name.endswith(state_conversion.MLX_SUFFIXES):
            raise ConfigError(
                f"--format mlx: mlx-lm does not support this adapter: {name}; give adapter, for peft"
            )
    values = {
        "fine_tune_type": "dora" if config.dora else "lora",
        "model": base,
        "num_layers": -1,  # all layers; the keys select the modules
        "lora_parameters": {
            "rank": config.lora_rank,
            "scale": state_conversion.adapter_scale(config),
            "dropout": config.lora_dropout,
            "keys": state_conversion.target_modules(names),
        },
    }
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def _require_one_of(flag: str, value: str | None, choices: Any) -> None:
    if value is not None and value not in get_args(choices):
        raise ConfigError(f"{flag} is {value!r}: give one of {', '.join(get_args(choices))}")


def _require_possible(form: ExportFormat, config: TrainConfig, file: CheckpointFile, to: Path) -> None:
    if form in ("adapter", "mlx") and not config.lora_rank:
        raise ConfigError(
            f"--format {form}: {file.path} has no adapter: all weights were trained (--lora-rank 0); "
            "give merged or state"
        )
    if form == "state" and to.suffix != STATE_SUFFIX:
        raise ConfigError(
            f"--to {to.name}: the state is one file; give it a name that ends in {STATE_SUFFIX}"
        )
