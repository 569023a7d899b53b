"""The facts of a model card, from the exported checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from distrust import __version__
from distrust.checkpoint import CheckpointFile
from distrust.config import BUNDLED, Dtype, ExportDtype, ExportFormat, TrainConfig, as_names, key
from distrust.engines.loading import hub_name
from distrust.export.card import Facts
from distrust.run_record import RunRecord

#: Code that loads each format. "FOLDER" stands for the path of the exported folder.
_LOAD_CODE = {
    "mlx": """from mlx_lm import load

model, tokenizer = load({model}, adapter_path="FOLDER")""",
    "merged": """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="{dtype}")""",
    "adapter": """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({model}, dtype="{base_dtype}")
model = PeftModel.from_pretrained(base, "FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")""",
}
_LIBRARIES = {"adapter": "peft", "mlx": "mlx", "merged": "transformers"}
_RECORDED_LIBRARIES = ("torch", "transformers", "peft", "mlx", "mlx_lm")
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
        config: of its run.
        title: of the card.
        base: current name or folder of the base model.
        form: ``adapter``, ``mlx`` or ``merged``.
        dtype: of the exported weights.
    """
    adapter = form != "merged"  # mlx, too
    return Facts(
        title=title,
        library=_LIBRARIES[form],
        base=public_name(base),
        hub_name=hub_name(base),
        tags=["distrust-trainer", "provenance-weighting", *(["lora"] if config.lora_rank else [])],
        summary=(
            "A LoRA adapter, trained with DistrustTrainer."
            if adapter
            else "A causal language model, fine-tuned with DistrustTrainer."
        ),
        load=_load_code(form, base, config.dtype, dtype),
        notes=_notes(config, form),
        sections=_sections(file, config, base=base, dtype=dtype),
    )


def public_name(name: str) -> str:
    """A name for publication: of a path on this machine, only the last part."""
    if os.path.isabs(name) or name.startswith(".") or os.path.exists(name):
        return os.path.basename(os.path.abspath(name))
    return name


def _public_names(names: str | Sequence[str] | None) -> str:
    return ", ".join(map(public_name, as_names(names)))


def _notes(config: TrainConfig, form: ExportFormat) -> list[str]:
    notes = []
    adapter = form != "merged"
    if form == "mlx":
        notes.append("The base model was not read. It is the right one if its fingerprint is the one below.")
    elif adapter:
        notes.append(
            "The adapter's names and shapes match the base model's. The base model's weights were not read. "
            "They are the right ones if their fingerprint is the one below."
        )
    elif config.lora_rank:
        notes.append("The adapter was merged into the base model's weights in float32, then rounded once.")
    if config.quantization != "none":
        hint = "Quantize it for the same numbers." if adapter else "This is the full-precision one."
        notes.append(f"The run used a base model quantized to `{config.quantization}`. {hint}")
    return notes


def _load_code(form: ExportFormat, base: str, base_dtype: Dtype, dtype: ExportDtype) -> str:
    """Python code that loads the folder."""
    hub = hub_name(base)
    model = f'"{hub}"' if hub else '"FOLDER-OF-THE-BASE-MODEL"'
    imports = ""
    if base == BUNDLED:
        imports, model = "from distrust.bundled import MODEL\n", "MODEL"
    code = _LOAD_CODE[form].format(model=model, base_dtype=base_dtype, dtype=dtype)
    return code if form == "merged" else imports + code


def _sections(
    file: CheckpointFile, config: TrainConfig, *, base: str, dtype: ExportDtype
) -> dict[str, Mapping[str, object]]:
    record = RunRecord.from_header(file.header)
    fingerprints, corpus, environment = record.fingerprints, record.corpus, record.environment
    options = config.with_effect("result")  # others do not change the weights
    weighting = {key(name): options.pop(key(name)) for name in _WEIGHTING}
    mix, eval_fraction = options.pop("mix"), options.pop("eval_fraction")
    sections: dict[str, Mapping[str, object]] = {
        "Checkpoint": {
            "step": file.step,
            "state digest": file.state_digest,
            "created (UTC)": file.created,
            "dtype of the weights": dtype,
        },
        "Base model": {
            "name": public_name(base),
            "fingerprint of its weights (BLAKE3)": fingerprints.get("model"),
        },
        "Data": {
            "name": _public_names(config.data),
            "mix": mix,
            "share held out for evaluation": eval_fraction or None,
            "examples": corpus.get("examples"),
            "trained tokens": corpus.get("tokens"),
            "tokens seen in training": record.tokens_seen,
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
            **{name: environment[name] for name in _RECORDED_LIBRARIES if name in environment},
        },
    }
    filled = {heading: _without_none(values) for heading, values in sections.items()}
    return {heading: values for heading, values in filled.items() if values}


def _without_none(values: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in values.items() if value is not None}
