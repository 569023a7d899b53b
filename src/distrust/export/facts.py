"""What a checkpoint says of itself, for the card of what is exported from it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from distrust import __version__
from distrust.checkpoint import CheckpointFile
from distrust.config import BUNDLED, Dtype, ExportDtype, ExportFormat, TrainConfig, key, several
from distrust.engines.source import hub_name
from distrust.export.card import Facts
from distrust.training.resume import FINGERPRINTS

#: For whoever loads it: where this folder lies then.
FOLDER = '"FOLDER"'
_WEIGHTING = ("weighting", "alpha", "lambda_", "max_ratio")


def facts_of(
    file: CheckpointFile,
    config: TrainConfig,
    *,
    title: str,
    base: str,
    form: ExportFormat,
    dtype: ExportDtype,
) -> Facts:
    """The facts of a model card.

    Args:
        file: the checkpoint.
        config: that it was trained with.
        title: of the card.
        base: name or folder of the base model, as it lies now.
        form: ``adapter`` or ``merged``.
        dtype: of the exported weights.
    """
    adapter = form == "adapter"
    return Facts(
        title=title,
        library="peft" if adapter else "transformers",
        base=public_name(base),
        hub_name=hub_name(base),
        tags=["distrust-trainer", "provenance-weighting", *(["lora"] if config.lora_rank else [])],
        summary=(
            "A LoRA adapter, trained with DistrustTrainer."
            if adapter
            else "A causal language model, fine-tuned with DistrustTrainer."
        ),
        load=_loading_adapter(base, config.dtype) if adapter else _loading_model(dtype),
        notes=_notes(config, adapter=adapter),
        sections=_sections(file, config, base=base, dtype=dtype),
    )


def public_name(name: str) -> str:
    """A name as strangers may read it: of a path on this machine, its last part."""
    if os.path.isabs(name) or name.startswith(".") or os.path.exists(name):
        return os.path.basename(os.path.abspath(name))
    return name


def _public_names(names: str | Sequence[str] | None) -> str:
    return ", ".join(map(public_name, several(names)))


def _notes(config: TrainConfig, *, adapter: bool) -> list[str]:
    notes = []
    if adapter:
        notes.append(
            "The adapter's names and shapes were compared with the base model's; the base model's weights "
            "were not read. They are the right ones if their fingerprint is the one below."
        )
    elif config.lora_rank:
        notes.append("The adapter was added to the base model's weights in float32, then rounded once.")
    if config.quantization != "none":
        now = "Load it so for the same numbers." if adapter else "This is the full-precision one."
        notes.append(f"The run computed with a base model quantized to `{config.quantization}`. {now}")
    return notes


def _loading_model(dtype: ExportDtype) -> str:
    return f"""from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({FOLDER})
model = AutoModelForCausalLM.from_pretrained({FOLDER}, dtype="{dtype}")"""


def _loading_adapter(base: str, dtype: Dtype) -> str:
    bundled, hub = base == BUNDLED, hub_name(base)
    where = "MODEL" if bundled else f'"{hub}"' if hub else '"FOLDER-OF-THE-BASE-MODEL"'
    imported = "from distrust.bundled import MODEL\n" if bundled else ""
    return f"""{imported}from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({where}, dtype="{dtype}")
model = PeftModel.from_pretrained(base, {FOLDER})
tokenizer = AutoTokenizer.from_pretrained({FOLDER})"""


def _sections(
    file: CheckpointFile, config: TrainConfig, *, base: str, dtype: ExportDtype
) -> dict[str, Mapping[str, object]]:
    run = file.header.run_info.get("extra", {})
    fingerprints = file.header.config.get(FINGERPRINTS, {})
    corpus = run.get("corpus", {})
    options = config.with_effect("result")
    weighting = {key(name): options.pop(key(name)) for name in _WEIGHTING}
    shares, kept_out = options.pop("mix"), options.pop("eval_fraction")
    environment = run.get("environment", {})
    sections: dict[str, Mapping[str, object]] = {
        "Checkpoint": {
            "step": file.step,
            "state digest": file.state_digest,
            "created (UTC)": file.created,
            "weights here": dtype,
        },
        "Base model": {
            "name": public_name(base),
            "fingerprint of its weights (BLAKE3)": fingerprints.get("model"),
        },
        "Data": {
            "name": _public_names(config.data),
            "shares": shares,
            "kept out to evaluate on": kept_out or None,
            "examples": corpus.get("examples"),
            "learned tokens": corpus.get("tokens"),
            "learned tokens seen in training": file.metadata.get("tokens_seen"),
            "fingerprint (BLAKE3)": fingerprints.get("data"),
            "authority weight of examples without one": config.default_authority_weight,
            "provenance entropy of examples without one": config.default_provenance_entropy,
            "evaluated on": _public_names(config.eval_data) or None,
        },
        "Weighting by provenance": weighting,
        "Metrics": file.metrics,
        "Training options": {**options, "max_steps": config.max_steps},
        "Versions": {
            "distrust-trainer": __version__,
            **{name: environment[name] for name in ("torch", "transformers", "peft") if name in environment},
        },
    }
    told = {heading: _without_none(values) for heading, values in sections.items()}
    return {heading: values for heading, values in told.items() if values}


def _without_none(values: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in values.items() if value is not None}
