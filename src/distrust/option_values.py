"""The values that options may have: their types, their bounds, and the names of metrics."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import date
from typing import Literal

from distrust.options import Bound, interval

#: As ``model`` or ``data``: the small ones that come with the package.
BUNDLED = "bundled"
#: As ``data`` and as ``model``: examples, or a model, that a program passed in. They name no file.
EXAMPLES, MODEL_OBJECT = "<examples>", "<model object>"
FLOAT32_MAX = 3.4e38
MAX_RECORD_BYTES = 1 << 24  # 16 MiB: three times the longest books

Precision = Literal["float32", "bfloat16"]
Dtype = Literal["auto", "float32", "bfloat16"]
ExportDtype = Literal["float32", "bfloat16", "float16"]
ExportFormat = Literal["adapter", "mlx", "merged", "state"]
EngineName = Literal["auto", "torch", "mlx"]
Reduction = Literal["exact", "fast"]
Shard = Literal["none", "base", "all"]
Quantization = Literal["none", "8bit", "4bit"]
OnLong = Literal["truncate", "drop", "error"]
Schedule = Literal["cosine", "linear", "constant", "wsd"]
WeightingOption = Literal["auto", "monotone", "published", "off"]
Clipping = Literal["weighted", "plain"]
OnMismatch = Literal["stop", "rewind"]
Reporter = Literal["tensorboard", "wandb"]

#: Metrics of each step, and of each evaluation. Some also exist for each source class: ``eval_loss/CLASS``.
STEP_METRICS = ("loss", "weighted_loss", "distrust", "gradient_norm", "learning_rate")
#: Those that are only logged if examples are weighted, and options (by key) that only then have an effect.
WEIGHT_METRICS = ("weighted_loss", "distrust")
WEIGHT_OPTIONS = (
    "alpha", "lambda", "max_ratio", "authority_weight_column", "provenance_entropy_column",
    "default_authority_weight", "default_provenance_entropy", "clipping",
)  # fmt: skip
PER_CLASS_METRICS = ("eval_loss", "eval_perplexity")
EVALUATION_METRICS = (*PER_CLASS_METRICS, "eval_weighted_loss", "eval_weighted_perplexity")


def _is_metric(name: str) -> bool:
    metric, slash, source_class = name.partition("/")
    if slash:
        return metric in PER_CLASS_METRICS and bool(source_class)
    return metric in STEP_METRICS + EVALUATION_METRICS


def _is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


SAVE_INTERVAL = Bound(
    lambda value: re.fullmatch(r"auto|\d+|[1-9]\d{0,5}[smh]", str(value), re.ASCII) is not None,
    "give a number of steps, a time such as 30s, 5m or 2h, or auto",
)
PREEMPTION_NOTICE = Bound(
    lambda notices: all(
        re.fullmatch(r"(file|command):.+|aws|gcp|azure", each, re.DOTALL) for each in notices
    ),
    "give file:PATH, command:LINE, aws, gcp or azure",
)
FLOAT32 = interval(0, FLOAT32_MAX, advice="give 0 or more, in float32's range")
NAME = Bound(lambda value: all(as_names(value)), "give a name")
DEVICE = Bound(
    lambda name: re.fullmatch("auto|cpu|mps|cuda(:(0|[1-9][0-9]{0,2}))?", name) is not None,
    "give one of auto, cpu, cuda, mps, or cuda:N for the GPU of that number",
)
DATE = Bound(_is_date, "give a day as YYYY-MM-DD")
METRIC = Bound(
    _is_metric, f"give one of {', '.join((*STEP_METRICS, *EVALUATION_METRICS))}, or eval_loss/CLASS"
)


def as_names(names: str | Sequence[str] | None) -> tuple[str, ...]:
    """The names in an option that takes one name or several; none for None."""
    if names is None:
        return ()
    return (names,) if isinstance(names, str) else tuple(names)
