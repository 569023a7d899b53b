"""The model card of an export: the README.md that people and hubs read, from the checkpoint.

Names of models, files and metrics may hold anything. In the front matter, which is YAML, each is a string in
double quotes with every invisible character escaped. In the text, each is in a code span, in which Markdown
has no effect, on one line.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distrust import __version__
from distrust.checkpoint import CheckpointFile
from distrust.config import TrainConfig
from distrust.config_text import to_words
from distrust.engines.loading import hub_name
from distrust.errors import shorten
from distrust.option_values import BUNDLED, WEIGHT_OPTIONS, Dtype, ExportDtype, ExportFormat, as_names
from distrust.run_record import RunRecord

#: Code that loads each format. "FOLDER" stands for the path of the exported folder.
_LOAD_CODE = {
    "mlx": """from mlx_lm import load

model, tokenizer = load({model}, adapter_path="FOLDER")""",
    "merged": """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="{dtype}")""",
    "adapter": """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

base = AutoModelForCausalLM.from_pretrained({model}, dtype="{base_dtype}")
base.generation_config = GenerationConfig.from_pretrained("FOLDER")  # stops at the ends of turns
model = PeftModel.from_pretrained(base, "FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")""",
}
_LIBRARIES = {"adapter": "peft", "mlx": "mlx", "merged": "transformers"}
_RECORDED_LIBRARIES = ("torch", "transformers", "peft", "mlx", "mlx_lm")
_WEIGHTING = ("weighting", "alpha", "lambda", "max_ratio")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The contents of a card."""

    title: str  # such as the name of the folder
    library: str  # loads the folder: peft, mlx or transformers
    base: str  # public name of the base model
    hub_name: str | None  # of the base model on a hub
    tags: Sequence[str]  # for hubs
    summary: str  # one sentence about the folder
    load: str  # Python code that loads the folder
    command: str  # trains the same; paths of the machine are left out
    notes: Sequence[str]  # sentences for users of the folder
    sections: Mapping[str, Mapping[str, object]]  # heading -> name -> value


def facts_of(
    file: CheckpointFile,
    config: TrainConfig,
    *,
    title: str,
    base: str,
    form: ExportFormat,
    dtype: ExportDtype,
) -> Facts:
    """The facts of an exported checkpoint, with the current name or folder of its base model."""
    if form == "merged":
        summary = "A causal language model, fine-tuned with DistrustTrainer."
    else:
        summary = "A LoRA adapter, trained with DistrustTrainer."
    return Facts(
        title=title,
        library=_LIBRARIES[form],
        base=public_name(base),
        hub_name=hub_name(base),
        tags=[
            "distrust-trainer",
            *(["provenance-weighting"] if config.weighting != "off" else []),
            *(["lora"] if config.lora_rank else []),
        ],
        summary=summary,
        load=_load_code(form, base, config.dtype, dtype),
        command=_command(config, RunRecord.from_header(file.header), base),
        notes=_notes(config, form, base),
        sections=_sections(file, config, base=base, dtype=dtype),
    )


def public_name(name: str) -> str:
    """A name for publication: of a path on this machine, only the last part."""
    if os.path.isabs(name) or name.startswith(".") or os.path.exists(name):
        return os.path.basename(os.path.abspath(name))
    return name


def _notes(config: TrainConfig, form: ExportFormat, base: str) -> list[str]:
    notes = []
    if form != "merged" and base != BUNDLED and hub_name(base) is None:
        notes.append(
            "The base model was in a folder. `adapter_config.json` names it without its path on the machine "
            "of the export: load the base model from where you have it."
        )
    if form == "mlx":
        notes.append("The base model was not read. It is the right one if its fingerprint is the one below.")
    elif form == "adapter":
        notes.append(
            "The adapter's names and shapes match the base model's. The base model's weights were not read. "
            "They are the right ones if their fingerprint is the one below."
        )
    elif config.lora_rank:
        notes.append("The adapter was merged into the base model's weights in float32, then rounded once.")
    if config.quantization != "none":
        is_merged = form == "merged"
        hint = "This is the full-precision one." if is_merged else "Quantize it for the same numbers."
        notes.append(f"The run used a base model quantized to `{config.quantization}`. {hint}")
    return notes


def _load_code(form: ExportFormat, base: str, base_dtype: Dtype, dtype: ExportDtype) -> str:
    """Python code that loads the folder."""
    model = "MODEL" if base == BUNDLED else f'"{hub_name(base) or "FOLDER-OF-THE-BASE-MODEL"}"'
    code = _LOAD_CODE[form].format(model=model, base_dtype=base_dtype, dtype=dtype)
    is_import_needed = base == BUNDLED and form != "merged"  # a merged model needs no base
    return f"from distrust.bundled import MODEL\n{code}" if is_import_needed else code


def _command(config: TrainConfig, record: RunRecord, base: str) -> str:
    """The command that trains the same, on one line: of paths only the last part, of a text no lines."""
    names = {"data": config.data, "eval_data": config.eval_data, "from": record.settings.get("from")}
    public = {name: [*map(public_name, map(str, as_names(value)))] for name, value in names.items() if value}
    options = config.non_default() | {"model": public_name(base)} | public
    words = [
        "FILE" if "\n" in word else word
        for name, value in options.items()
        if name not in ("engine", "device")
        for word in to_words(name, value)
    ]
    return shlex.join(["distrust", "train", *words])


def _sections(
    file: CheckpointFile, config: TrainConfig, *, base: str, dtype: ExportDtype
) -> dict[str, Mapping[str, object]]:
    record = RunRecord.from_header(file.header)
    fingerprints, corpus, environment = record.fingerprints, record.corpus, record.environment
    options = config.with_effect("result")  # others do not change the weights
    hidden = WEIGHT_OPTIONS if config.weighting == "off" else ()
    options = {name: value for name, value in options.items() if name not in hidden}
    weighting = {name: options.pop(name) for name in _WEIGHTING if name in options}
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
            "name": ", ".join(map(public_name, as_names(config.data))),
            "mix": mix,
            "share held out for evaluation": eval_fraction or None,
            "examples": corpus.get("examples"),
            "trained tokens": corpus.get("tokens"),
            "tokens seen in training": record.tokens_seen,
            "fingerprint (BLAKE3)": fingerprints.get("data"),
            "authority weight of examples without one": config.default_authority_weight,
            "provenance entropy of examples without one": config.default_provenance_entropy,
            "evaluated on": ", ".join(map(public_name, as_names(config.eval_data))) or None,
        },
        "Weighting by provenance": weighting if not hidden else {},
        "Metrics": file.metrics,
        "Training options": {**options, "max_steps": config.max_steps},
        "Versions": {
            "distrust-trainer": __version__,
            **{name: environment[name] for name in _RECORDED_LIBRARIES if name in environment},
        },
    }
    return {
        heading: {name: value for name, value in values.items() if value is not None}
        for heading, values in sections.items()
    }


def model_card(facts: Facts) -> str:
    """Render the text of the README.md."""
    lines = [
        *_front_matter(facts),
        "",
        f"# {_code_span(facts.title)}",
        "",
        f"{facts.summary} Base model: {_code_span(facts.base)}.",
        "",
        *_code_block(facts.load, "python"),
        "",
        "It was trained with these options:",
        "",
        *_code_block("".join(map(_escape, facts.command)), "sh"),
    ]
    lines += [line for note in facts.notes for line in ("", note)]
    for heading, values in facts.sections.items():
        if not values:
            continue
        lines += ["", f"## {heading}", ""]
        lines += [f"- {_code_span(name)}: {_code_span(_text(value))}" for name, value in values.items()]
    return "\n".join(lines) + "\n"


def yaml_text(text: str) -> str:
    """A YAML string in double quotes: any reader gets the text back, lone surrogates as U+FFFD."""
    escapes = {'"': '\\"', "\\": "\\\\"}
    return '"' + "".join(escapes.get(char) or _escape(char) for char in text) + '"'


def _front_matter(facts: Facts) -> list[str]:
    relation = "finetune" if facts.library == "transformers" else "adapter"
    lines = ["---", f"library_name: {facts.library}", "pipeline_tag: text-generation"]
    if facts.hub_name is not None:  # a hub rejects the name of a local folder
        lines += [f"base_model: {yaml_text(facts.hub_name)}", f"base_model_relation: {relation}"]
    return [*lines, "tags:", *(f"- {yaml_text(tag)}" for tag in facts.tags), "---"]


def _code_span(text: str) -> str:
    line = "".join(map(_escape, shorten(text)))
    fence = "`" * (_longest_fence(line) + 1)
    # Markdown strips one space at each end: the text may begin or end with a backtick, or be empty.
    pad = " " if not line.strip() or line[0] in "` " or line[-1] in "` " else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def _code_block(code: str, language: str) -> list[str]:
    fence = "`" * max(3, _longest_fence(code) + 1)
    return [f"{fence}{language}", *code.rstrip("\n").split("\n"), fence]


def _longest_fence(text: str) -> int:
    """The length of the longest run of backticks: a fence must be longer."""
    return max(map(len, re.findall("`+", text)), default=0)


def _escape(char: str) -> str:
    """A character, or if it is invisible an escape that YAML reads and people can read too."""
    if 0xD800 <= ord(char) < 0xE000:
        return "\ufffd"  # a lone surrogate: UTF-8 cannot encode it
    return char if char.isprintable() else char.encode("unicode_escape").decode()


def _text(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
