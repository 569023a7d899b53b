"""Writes a checkpoint of DistrustCheckpoints as the Trainer's own folder. Its pickles hold plain data."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import EarlyStoppingCallback, TrainerControl

from distrust.atomic import atomic_directory
from distrust.checkpoint import Checkpoint
from distrust.errors import ConfigError, CorruptCheckpoint, ErrorTranslator, quote_untrusted, shorten


def write(to: Path, checkpoint: Checkpoint) -> None:
    """Write what :class:`DistrustCheckpoints` saved, with tensors of torch, bit for bit into a new folder.

    Raises:
        ConfigError: another library saved it, it has weights beside an adapter, or ``to`` has another step.
        CorruptCheckpoint: a part is not as :class:`DistrustCheckpoints` saves it.
        ExportFailed: something exists at ``to``, or it cannot be written. Nothing was created.
    """
    step, name = checkpoint.step, re.fullmatch(r"checkpoint-(\d+)", to.name)
    if name and int(name[1]) != step:  # the Trainer resumes from the highest number
        raise ConfigError(f"{to}: the checkpoint is of step {step}: name the folder checkpoint-{step}")
    with report_malformed("not what DistrustCheckpoints saves"):
        saved, states, rng = checkpoint.run["integration"], checkpoint.optimizer, checkpoint.rng
        if (program := saved["program"]) != "transformers":
            raise ConfigError(f"{to}: saved in a loop of {quote_untrusted(str(program))}: resume it there")
        prefix, config, weights = "", saved["model_config"], checkpoint.model["parameters"]
        if saved["peft_config"] is None:
            weights = {**weights, **rng.get("buffers", {})}
        else:
            prefix, config = "adapter_", {**saved["peft_config"], "inference_mode": True}  # as peft saves it
            weights = {_peft_name(parameter): tensor for parameter, tensor in weights.items()}
        config_text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        files = {f"{part}.pt": states.get(part) for part in ("optimizer", "scheduler", "scaler")}
        files["rng_state.pth"] = _generators(rng["now"]) if "now" in rng else None
        trainer_state = json.loads(bytes(checkpoint.history["trainer_state"].tolist()))
        for callback in (TrainerControl(), EarlyStoppingCallback()):  # without their entries it cannot save
            trainer_state["stateful_callbacks"].setdefault(type(callback).__name__, callback.state())
    kinds = (SafetensorError, RuntimeError, ValueError)  # of failed writes, in the libraries' own classes
    failed_write = ErrorTranslator(kinds, lambda error: OSError(" ".join(str(error).split())))
    with atomic_directory(to) as folder, failed_write:
        save_file(weights, folder / f"{prefix}model.safetensors", metadata={"format": "pt"})
        (folder / f"{prefix}config.json").write_text(config_text, encoding="utf-8")
        (folder / "trainer_state.json").write_text(json.dumps(trainer_state, indent=2, sort_keys=True) + "\n")
        for file_name, state in files.items():
            if state is not None:
                torch.save(state, folder / file_name)


def report_malformed(reason: str) -> ErrorTranslator:
    """Context manager that reports parts of a checkpoint that are missing or of another type."""
    kinds = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
    return ErrorTranslator(kinds, lambda error: CorruptCheckpoint(f"{reason}: {shorten(repr(error))}"))


def _peft_name(name: str) -> str:
    """The name in peft's files of a trained parameter: without the adapter's, and of DoRA without its end."""
    renamed = re.sub(r"(?<=_vector)\.default\.weight|(\.modules_to_save)?\.default(?=\.|$)", "", name)
    if renamed == name:
        raise ConfigError(f"{quote_untrusted(name)}: trained, but not in an adapter of the name 'default'")
    return renamed


def _generators(states: Mapping[str, Any]) -> dict[str, Any]:
    """The states of :func:`distrust.integrations.random.generators`, as the Trainer saves them."""
    python, numpy = states["python"], states["numpy"]
    words, key = (tuple(map(int, numbers.tolist())) for numbers in (python["words"], numpy["key"]))
    return {
        "python": (python["version"], words, python["gauss"]),
        "numpy": (numpy["kind"], key, numpy["position"], numpy["has_gauss"], numpy["cached"]),
        "cpu": states["torch"],
        **({"cuda": states["cuda"][0]} if "cuda" in states else {}),
    }
