"""Every option once: its name, type, default, what it changes, and its doc beneath it.

The flags, their help, the keys of a TOML file and the copy in a checkpoint all come from these fields. What
an option changes decides what happens when it differs at resume:

- ``result``: the mathematics. A difference is refused.
- ``bits``: the last bits only. A difference is warned of.
- ``free``: nothing of the result.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import os
import tomllib
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from os.path import realpath
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from distrust.checkpoint.retention import MetricMode
from distrust.errors import ConfigError, read_failure_reason, shorten
from distrust.weighting import ALPHA, ALPHA_RANGE, LAMBDA, MAX_AUTHORITY_WEIGHT, Weighting

#: As ``model`` or ``data``: the small ones that come with the package.
BUNDLED = "bundled"

FLOAT32_MAX = 3.4e38

W_RANGE = (0, MAX_AUTHORITY_WEIGHT)
#: As ``data`` of a run on examples that a program handed over: it stands for no file.
EXAMPLES = "<examples>"
#: Options that are names of files or folders, those that may be several, and other names.
_PATHS = ("model", "data", "out", "eval_data", "branch")
_SEVERAL = ("data", "eval_data", "prompt_column")

_NAMES = (
    "split",
    "subset",
    "revision",
    "text_column",
    "prompt_column",
    "completion_column",
    "messages_column",
    "authority_weight_column",
    "provenance_entropy_column",
    "source_column",
    "eval_split",
)

Effect = Literal["result", "bits", "free"]
Dtype = Literal["float32", "bfloat16"]
ExportDtype = Literal["float32", "bfloat16", "float16"]
ExportFormat = Literal["adapter", "mlx", "merged", "state"]
EngineName = Literal["auto", "torch", "mlx"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Quantization = Literal["none", "8bit", "4bit"]
Schedule = Literal["cosine", "linear", "constant"]
Clipping = Literal["weighted", "plain"]
Reporter = Literal["tensorboard", "wandb"]
#: What is logged of each step, and of each evaluation; some of each source class, too: ``eval_loss/CLASS``.
STEP_METRICS = ("loss", "weighted_loss", "distrust", "gradient_norm", "learning_rate")
PER_CLASS_METRICS = ("eval_loss", "eval_perplexity")
EVALUATION_METRICS = (*PER_CLASS_METRICS, "eval_weighted_loss", "eval_weighted_perplexity")


def _option(default: Any, effect: Effect) -> Any:
    return field(default=default, metadata={"effect": effect})


def _result(default: Any) -> Any:
    return _option(default, "result")


def _bits(default: Any) -> Any:
    return _option(default, "bits")


def _free(default: Any) -> Any:
    return _option(default, "free")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What to train, on what, and how.

    The help shows a doc's lines as they stand: one that is broken in two is broken between sentences.

    Raises:
        ConfigError: naming every option that is wrong, one a line.
    """

    # What to train on what. Models and data are compared by fingerprint, not by name.
    model: str = _free(BUNDLED)
    """Base model: a folder, a hub name, or "bundled" for the small one that comes with the package."""
    data: str | tuple[str, ...] = _free(BUNDLED)
    """Training examples, one source or several, or "bundled" for the corpus that comes with the package.
    A source is a file (JSON Lines, JSON, CSV, TSV, Parquet), a folder of files, or a data set of the hub."""
    out: str = _free("runs/train")
    """Folder of the run. The same command with the same folder continues the run."""
    eval_data: str | tuple[str, ...] | None = _free(None)
    """What to evaluate on, by plain cross-entropy: the same kinds of source."""
    max_length: int | None = _result(None)
    """Tokens of an example; what is longer is cut. Default: 1024, or the model's context if that is less."""
    default_authority_weight: float | None = _free(None)
    """Authority weight of examples that carry none. Without it they are an error, unless weighting is off."""
    default_provenance_entropy: float | None = _free(None)
    """Provenance entropy in bits of examples that carry none. Without it they are an error, as above."""

    # Data
    mix: tuple[float, ...] | None = _result(None)
    """Shares of the sources in an epoch, one for each of `data`. Default: all examples of all sources."""
    split: str = _free("train")
    """Split to train on: of a hub data set, or of a folder whose files name splits."""
    subset: str | None = _free(None)
    """Configuration of a hub data set, where it has several."""
    revision: str | None = _free(None)
    """Branch, tag or commit of a hub data set."""
    text_column: str | None = _free(None)
    """Column of the text. Default: "text"."""
    prompt_column: str | tuple[str, ...] | None = _free(None)
    """Column of the prompt. Several are joined, an empty line after each. Default: "prompt"."""
    completion_column: str | None = _free(None)
    """Column of the completion. Default: "completion"."""
    messages_column: str | None = _free(None)
    """Column of the conversation. Default: "messages", or "conversations"."""
    authority_weight_column: str | None = _free(None)
    """Column of the authority weight. Default: "authority_weight", or "auth_weight"."""
    provenance_entropy_column: str | None = _free(None)
    """Column of the provenance entropy. Default: "provenance_entropy", or "prov_entropy"."""
    source_column: str | None = _free(None)
    """Column of an example's source class, by which losses and weights are shown. Default: "source"."""
    eval_split: str | None = _free(None)
    """Split to evaluate on: of `eval_data`, or else of `data`."""
    eval_fraction: float = _result(0.0)
    """Share of each source that is kept out of training, chosen by the seed, and evaluated on."""
    cache_dir: str | None = _free(None)
    """Folder of tokenized data. Default: $DISTRUST_CACHE, or distrust in the user's cache folder."""

    # Weighting
    weighting: Weighting = _result("monotone")
    """How provenance weighs an example: "monotone", "published" (the squared term as it stands), "off"."""
    alpha: float = _result(ALPHA)
    """Strength of the empirical distrust term, 2.3 to 3.0."""
    lambda_: float = _result(LAMBDA)
    """How far the term enters the example's weight: 1 + lambda * alpha * term; 0 or more."""
    max_ratio: float | None = _result(None)
    """Largest ratio between two examples' weights; default: no bound."""

    # Adapter
    lora_rank: int = _result(16)
    """Rank of the LoRA adapter; 0 trains all weights of the model."""
    lora_alpha: float = _result(32.0)
    """LoRA scale: the adapter's output is multiplied by alpha / rank."""
    lora_dropout: float = _result(0.0)
    """Dropout before the adapter, 0 to under 1."""
    target_modules: tuple[str, ...] = _result(("all-linear",))
    """Names of the modules that get an adapter, or "all-linear"."""

    rslora: bool = _result(False)
    """Scale the adapter's output by alpha / sqrt(rank) instead (rank-stabilized LoRA)."""
    dora: bool = _result(False)
    """Train the magnitude of each weight's columns apart from their direction (DoRA)."""

    # Optimization
    max_steps: int | None = _free(None)
    """Optimizer steps of the whole run. Default: as many as `epochs` take."""
    epochs: int = _free(3)
    """Passes over the data, where `max_steps` is not given."""
    batch_size: int = _result(8)
    """Rows of a micro-batch: examples, or with `packing` rows of up to `max_length` tokens."""
    packing: bool = _result(False)
    """Fill each row with whole examples; attention and positions stay within each of them."""
    gradient_accumulation: int = _result(1)
    """Micro-batches of an optimizer step."""
    learning_rate: float = _result(2e-4)
    """Peak learning rate."""
    warmup_steps: int = _result(10)
    """Steps in which the learning rate rises to its peak."""
    warmup_ratio: float | None = _result(None)
    """Share of the schedule's steps to warm up in, 0 to 1, instead of `warmup_steps`."""
    schedule: Schedule = _result("cosine")
    """How the learning rate falls after the warm-up."""
    schedule_steps: int | None = _result(None)
    """Steps after which the schedule has ended, fixed when the run begins. Default: its max_steps."""
    weight_decay: float = _result(0.0)
    """AdamW's weight decay, on matrices."""
    adam_beta1: float = _result(0.9)
    """AdamW's decay of the first moment."""
    adam_beta2: float = _result(0.999)
    """AdamW's decay of the second moment."""
    adam_epsilon: float = _result(1e-8)
    """AdamW's epsilon."""
    max_grad_norm: float = _result(1.0)
    """Gradients are scaled down to this norm; 0 for no clipping."""
    clipping: Clipping = _result("weighted")
    """That norm for a step of heavy examples: "weighted", times their mean weight, or "plain", the same."""
    seed: int = _result(0)
    """Seed of the order of the data, of the adapter's first values and of dropout."""

    # Computing
    engine: EngineName = _bits("auto")
    """What trains: "torch", "mlx", or with "auto" what trained the run until now.
    A new run gets mlx on Apple silicon where it is installed, or where torch is not, and torch elsewhere."""
    dtype: Dtype = _result("float32")
    """Precision of the frozen base and of the arithmetic. What is trained is always float32."""
    device: Device = _bits("auto")
    """Where to compute; "auto": CUDA, else MPS, else the CPU. With mlx, "mps" is Apple's GPU."""
    threads: int | None = _bits(None)
    """CPU threads of torch. Default: the machine's, or those that the run began with."""
    compile: bool = _bits(False)
    """Have torch compile the layers, a minute at the start; CPUs need a C++ compiler, and gain little.
    With mlx, steps are compiled on a GPU anyway."""
    gradient_checkpointing: bool = _bits(False)
    """Keep fewer activations and compute them again: less memory, more time."""

    # Memory
    quantization: Quantization = _result("none")
    """Bits that the frozen base is kept in: "8bit", "4bit", or "none" for those of `dtype`. LoRA only."""
    reload_every: int | None = _free(None)
    """Steps after which memory is reset: model and optimizer are dropped and built again, bit for bit."""
    reload_above: float | None = _free(None)
    """GiB, resident on the host or allocated on the device, above which memory is reset."""
    max_memory: float | None = _free(None)
    """GiB, on the host or on the device, that no step may pass: the run stops before, saved."""

    # Checkpoints and reports
    save_every: int = _free(50)
    """Steps between checkpoints; 0 saves only the final one."""
    keep_last: int = _free(3)
    """Checkpoints to keep, newest first."""
    keep_best: int = _free(1)
    """Checkpoints to keep by `metric`, besides."""
    keep_every: int | None = _free(None)
    """Keep each checkpoint whose step is a multiple of this, besides."""
    metric: str = _free("eval_loss")
    """Metric that tells the best checkpoint: any that is logged; of a source class, "eval_loss/CLASS"."""
    metric_mode: MetricMode = _free("min")
    """Whether a lower or a higher value of `metric` is better."""
    eval_every: int = _free(50)
    """Steps between evaluations, where there is something to evaluate on."""
    eval_at_start: bool = _free(False)
    """Evaluate before the first step, too."""
    early_stopping_patience: int | None = _free(None)
    """End the run after so many evaluations in a row in which `metric` did not improve. Default: never."""
    report_to: tuple[Reporter, ...] = _free(())
    """Log to "tensorboard" or "wandb" (Weights & Biases) besides metrics.jsonl."""
    log_every: int = _free(10)
    """Steps between lines, where the output is no terminal."""
    from_step: int | None = _free(None)
    """Begin at this checkpoint of `out` instead of the newest one."""
    branch: str | None = _free(None)
    """Folder of the new run, where `from_step` is not the newest checkpoint."""

    def __post_init__(self) -> None:
        for name in {*_PATHS, *_SEVERAL, "cache_dir"}:
            object.__setattr__(self, name, _to_plain(getattr(self, name)))
        problems = []
        for name, hint in _hints().items():  # as flags and files give them: equal ones compare equal
            if get_origin(hint) is Literal:
                continue  # told below, with what else is out of its bounds
            try:
                object.__setattr__(self, name, _coerce(getattr(self, name), hint))
            except TypeError as error:
                problems.append(f"{flag(name)} is {shorten(repr(getattr(self, name)))}: {error}")
        if problems:  # what is of a wrong type has no bounds
            raise ConfigError("\n".join(problems))
        problems = [
            f"{flag(name)} is {shorten(repr(getattr(self, name)))}: {wanted}"
            for name, holds, wanted in _bounds(self)
            if not holds
        ]
        if problems:
            raise ConfigError("\n".join(problems))

    @property
    def run_directory(self) -> Path:
        """The folder that the run writes to."""
        return Path(self.branch or self.out)

    def with_effect(self, effect: Effect) -> dict[str, Any]:
        """The options of one effect, by key."""
        values = asdict(self)
        return {key(f.name): values[f.name] for f in fields(self) if f.metadata["effect"] == effect}


def from_mapping(values: Mapping[str, Any], *, where: str) -> TrainConfig:
    """A config of the keys of a TOML file or of a checkpoint.

    Args:
        values: key -> value; what is missing has its default.
        where: for messages: where the keys stand.

    Raises:
        ConfigError: naming every unknown key, with the nearest known one, and every value of a wrong type.
    """
    hints = _hints()
    known = {key(name): name for name in hints}
    problems = []
    arguments = {}
    for given, value in values.items():
        if isinstance(value, dict):
            problems.append(f"{where}: [{given}] is a table; options stand at the top, as key = value")
        elif given not in known:
            problems.append(f"{where}: unknown option {shorten(repr(given))}{suggest_name(given, known)}")
        else:
            try:
                arguments[known[given]] = _coerce(value, hints[known[given]])
            except TypeError as error:
                problems.append(f"{where}: {shorten(given)} is {shorten(repr(value))}: {error}")
    if problems:
        raise ConfigError("\n".join(problems))
    try:
        return TrainConfig(**arguments)
    except ConfigError as error:
        raise ConfigError("\n".join(f"{where}: {line}" for line in str(error).splitlines())) from None


def from_toml(path: Path) -> TrainConfig:
    """A config of a TOML file.

    Raises:
        ConfigError: if the file cannot be read, or for what :func:`from_mapping` refuses.
    """
    try:
        with path.open("rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"--config {path}: {read_failure_reason(error)}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: not valid TOML: {error}") from None
    return from_mapping(values, where=str(path))


def flag(name: str) -> str:
    """The flag of a field, as a user types it."""
    return "--" + key(name).replace("_", "-")


def key(name: str) -> str:
    """The key of a field in a file: Python's keyword ``lambda`` keeps its own name there."""
    return name.rstrip("_")


def option_keys() -> list[str]:
    """The keys of all options, in the order of their fields."""
    return [key(option.name) for option in fields(TrainConfig)]


def as_names(names: str | Sequence[str] | None) -> tuple[str, ...]:
    """The names that an option gives: of one that may be several, all; none of None."""
    if names is None:
        return ()
    return (names,) if isinstance(names, str) else tuple(names)


def _to_plain(value: Any) -> Any:
    """Paths as strings, and one name as itself, not as a list of one."""
    if isinstance(value, (list, tuple)):
        names = tuple(os.fspath(name) if isinstance(name, os.PathLike) else name for name in value)
        return names[0] if len(names) == 1 else names or ("",)
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _bounds(c: TrainConfig) -> list[tuple[str, bool, str]]:
    def finite(value: float) -> bool:
        return math.isfinite(value)

    return [
        *((name, all(as_names(getattr(c, name))), "give a name") for name in _PATHS),
        ("max_length", c.max_length is None or c.max_length >= 2, "give 2 or more"),
        (
            "default_authority_weight",
            in_range(c.default_authority_weight, *W_RANGE),
            f"give up to {W_RANGE[1]}",
        ),
        ("default_provenance_entropy", in_range(c.default_provenance_entropy, 0), "give 0 or more"),
        (
            "mix",
            c.mix is None
            or (
                len(c.mix) == len(as_names(c.data))
                and all(in_range(share, 0) for share in c.mix)
                and any(c.mix)
            ),
            "give a share, 0 or more, for each source of --data, and not only zeros",
        ),
        *((name, all(as_names(getattr(c, name))), "give a name") for name in _NAMES),
        ("eval_fraction", 0 <= c.eval_fraction < 1, "give 0 to under 1"),
        (
            "eval_fraction",
            not (c.eval_fraction and (c.eval_data or c.eval_split)),
            "give it without --eval-data and --eval-split",
        ),
        ("cache_dir", c.cache_dir != "", "give a name"),
        ("weighting", c.weighting in get_args(Weighting), f"give one of {', '.join(get_args(Weighting))}"),
        ("alpha", in_range(c.alpha, *ALPHA_RANGE), f"give {ALPHA_RANGE[0]} to {ALPHA_RANGE[1]}"),
        ("lambda_", in_range(c.lambda_, 0), "give 0 or more"),
        ("max_ratio", in_range(c.max_ratio, 1), "give 1 or more"),
        ("lora_rank", c.lora_rank >= 0, "give 1 or more, or 0 to train all weights"),
        ("lora_alpha", c.lora_alpha > 0 and finite(c.lora_alpha), "give more than 0"),
        ("lora_dropout", 0 <= c.lora_dropout < 1, "give 0 to under 1"),
        *(
            (name, not getattr(c, name) or c.lora_rank > 0, "give a --lora-rank; 0 makes no adapter")
            for name in ("rslora", "dora")
        ),
        ("target_modules", len(c.target_modules) > 0, "give at least one name"),
        ("max_steps", c.max_steps is None or c.max_steps >= 1, "give 1 or more"),
        ("epochs", c.epochs >= 1, "give 1 or more"),
        ("batch_size", c.batch_size >= 1, "give 1 or more"),
        ("gradient_accumulation", c.gradient_accumulation >= 1, "give 1 or more"),
        (
            "learning_rate",
            in_range(c.learning_rate, 0, FLOAT32_MAX),
            "give 0 or more, in float32's range",
        ),
        ("warmup_steps", c.warmup_steps >= 0, "give 0 or more"),
        ("warmup_ratio", in_range(c.warmup_ratio, 0, 1), "give 0 to 1"),
        ("schedule", c.schedule in get_args(Schedule), f"give one of {', '.join(get_args(Schedule))}"),
        ("schedule_steps", c.schedule_steps is None or c.schedule_steps >= 1, "give 1 or more"),
        ("weight_decay", in_range(c.weight_decay, 0, FLOAT32_MAX), "give 0 or more, in float32's range"),
        ("adam_beta1", 0 <= c.adam_beta1 < 1, "give 0 to under 1"),
        ("adam_beta2", 0 <= c.adam_beta2 < 1, "give 0 to under 1"),
        ("adam_epsilon", c.adam_epsilon > 0 and finite(c.adam_epsilon), "give more than 0"),
        ("max_grad_norm", in_range(c.max_grad_norm, 0), "give 0 or more"),
        ("clipping", c.clipping in get_args(Clipping), f"give one of {', '.join(get_args(Clipping))}"),
        ("seed", 0 <= c.seed < 2**63, "give 0 to 2^63 - 1"),
        ("engine", c.engine in get_args(EngineName), f"give one of {', '.join(get_args(EngineName))}"),
        ("dtype", c.dtype in get_args(Dtype), f"give one of {', '.join(get_args(Dtype))}"),
        ("device", c.device in get_args(Device), f"give one of {', '.join(get_args(Device))}"),
        ("threads", c.threads is None or c.threads >= 1, "give 1 or more"),
        (
            "quantization",
            c.quantization in get_args(Quantization),
            f"give one of {', '.join(get_args(Quantization))}",
        ),
        (
            "quantization",
            c.quantization not in ("8bit", "4bit") or c.lora_rank != 0,
            "give --lora-rank 1 or more with it: quantized weights are frozen",
        ),
        ("reload_every", c.reload_every is None or c.reload_every >= 1, "give 1 or more"),
        ("reload_above", _is_amount(c.reload_above), "give more than 0"),
        ("max_memory", _is_amount(c.max_memory), "give more than 0"),
        ("save_every", c.save_every >= 0, "give 1 or more, or 0 for the final one only"),
        ("keep_last", c.keep_last >= 1, "give 1 or more"),
        ("keep_best", c.keep_best >= 0, "give 0 or more"),
        ("keep_every", c.keep_every is None or c.keep_every >= 1, "give 1 or more"),
        (
            "metric",
            _is_metric(c.metric),
            f"give one of {', '.join((*STEP_METRICS, *EVALUATION_METRICS))}, or eval_loss/CLASS",
        ),
        ("metric_mode", c.metric_mode in get_args(MetricMode), "give min or max"),
        ("eval_every", c.eval_every >= 1, "give 1 or more"),
        (
            "early_stopping_patience",
            c.early_stopping_patience is None or c.early_stopping_patience >= 1,
            "give 1 or more",
        ),
        ("report_to", len(set(c.report_to)) == len(c.report_to), "give each once"),
        ("log_every", c.log_every >= 1, "give 1 or more"),
        ("from_step", c.from_step is None or c.from_step >= 0, "give 0 or more"),
        ("branch", c.branch is None or c.from_step is not None, "say where it begins, with --from-step"),
        (
            "branch",
            c.branch is None or realpath(c.branch) != realpath(c.out),
            "give another one than --out",
        ),
    ]


def in_range(value: float | None, low: float, high: float = math.inf) -> bool:
    """Whether a value is None, or finite and in [low, high]."""
    try:
        return value is None or (math.isfinite(value) and low <= value <= high)
    except OverflowError:  # an integer beyond the largest float
        return False


def _is_metric(name: str) -> bool:
    head, slash, of_class = name.partition("/")
    if slash:
        return head in PER_CLASS_METRICS and bool(of_class)
    return head in STEP_METRICS + EVALUATION_METRICS


def _is_amount(value: float | None) -> bool:
    return value is None or (math.isfinite(value) and value > 0)


@cache
def _hints() -> dict[str, Any]:
    return get_type_hints(TrainConfig)


def suggest_name(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: ``; did you mean X?``, or nothing."""
    # Files may be written with the flags' hyphens.
    close = difflib.get_close_matches(name.lower().replace("-", "_"), known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _coerce(value: Any, hint: Any) -> Any:
    """``value`` as the annotated type, where that loses nothing; else TypeError says what is wanted."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in get_args(hint):
            return None
        *others, inner = [choice for choice in get_args(hint) if choice is not type(None)]
        if not others:
            return _coerce(value, inner)
        if isinstance(value, str):
            return value
        with contextlib.suppress(TypeError):
            return _coerce(value, inner)
        raise TypeError("give a name, or a list of names")
    if origin is Literal:
        if value in get_args(hint):
            return value
        raise TypeError(f"give one of {', '.join(get_args(hint))}")
    if origin is tuple:
        inner = get_args(hint)[0]
        with contextlib.suppress(TypeError):
            if isinstance(value, (list, tuple)):
                return tuple(_coerce(item, inner) for item in value)
        if get_origin(inner) is Literal:
            raise TypeError(f"give a list of {', '.join(get_args(inner))}")
        raise TypeError(f"give a list of {'strings' if inner is str else 'numbers'}")
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        article = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
        raise TypeError(f"give {article[hint]}")
    return value
