"""The options of a run. Each is defined once: name, type, default, group, effect, bounds, documentation.

Flags, their help, the keys of a TOML file and the copy in a checkpoint derive from the fields. The effect of
an option decides what happens if it differs at a resume:

- ``result``: it changes the result. A difference is refused.
- ``bits``: it changes only the last bits. A difference gives a warning.
- ``free``: it does not change the result.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import Field, dataclass, fields
from functools import cache
from os.path import realpath
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

from distrust import option_values as values
from distrust.checkpoint.remote.location import is_url, parse
from distrust.checkpoint.retention import MetricMode
from distrust.errors import ConfigError
from distrust.options import (
    ABOVE_ZERO,
    BELOW_ONE,
    NON_NEGATIVE,
    POSITIVE,
    RANGES,
    Bound,
    Documentation,
    Effect,
    Group,
    as_text,
    coerce,
    in_range,
    interval,
    read_docs,
    to_plain,
)
from distrust.paths import local_folder
from distrust.weighting import ALPHA, ALPHA_RANGE, LAMBDA, MAX_AUTHORITY_WEIGHT

_MODEL, _DATA, _RUN = Group("Model"), Group("Data"), Group("Run")
_WEIGHTING, _LORA, _OPTIMIZATION = Group("Weighting"), Group("LoRA"), Group("Optimization")
_EVALUATION, _CHECKPOINTS, _LOGGING = Group("Evaluation"), Group("Checkpoints"), Group("Logging")
_COMPUTE, _MEMORY, _RANKS = Group("Compute"), Group("Memory"), Group("Processes")
_MIRROR, _FAULTS = Group("Mirror"), Group("Faults")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What to train, on what data, and how.

    Raises:
        ConfigError: naming every invalid option, one per line.
    """

    model: str = _MODEL.free(values.BUNDLED, values.NAME)
    """Base model: a folder, a name on the Hugging Face Hub, or "bundled" for the small model that comes with
    the package. A resume compares its weights, not its name."""
    chat_template: str | None = _MODEL.free(None, values.NAME)
    """Chat template of conversations: a file, or "chatml" for the one that comes with the package. Default:
    that of the model's tokenizer. A resume compares its content, not its name."""
    max_length: int | None = _MODEL.result(None, interval(2))
    """Maximum tokens of a sequence; see `on_long`. Default: 1024, or the model's context if it is shorter."""

    data: str | tuple[str, ...] | None = _DATA.free(None, values.NAME)
    """Training examples: one source or several. A source is a file (JSON Lines, JSON, CSV, TSV, Parquet), a
    folder of files, a dataset on the Hugging Face Hub, or "bundled" for the corpus that comes with the
    package. Only for the bundled model there is a default: "bundled". A resume compares the content, not the
    names."""
    mix: tuple[float, ...] | None = _DATA.result(None)
    """Shares of the sources in an epoch, one for each of `data`. Default: all examples of all sources."""
    split: str = _DATA.free("train", values.NAME)
    """Split to train on: of a Hub dataset, or of a folder whose file names contain splits."""
    subset: str | None = _DATA.free(None, values.NAME)
    """Configuration of a Hub dataset that has several."""
    revision: str | None = _DATA.free(None, values.NAME)
    """Branch, tag or commit of a Hub dataset."""
    text_column: str | None = _DATA.free(None, values.NAME)
    """Column of the text. Default: "text"."""
    prompt_column: str | tuple[str, ...] | None = _DATA.free(None, values.NAME)
    """Column of the prompt. Several columns are joined, each followed by an empty line. Default: "prompt"."""
    completion_column: str | None = _DATA.free(None, values.NAME)
    """Column of the completion. Default: "completion"."""
    messages_column: str | None = _DATA.free(None, values.NAME)
    """Column of the conversation. Default: "messages", or "conversations"."""
    authority_weight_column: str | None = _DATA.free(None, values.NAME)
    """Column of the authority weight. Default: "authority_weight", or "auth_weight"."""
    provenance_entropy_column: str | None = _DATA.free(None, values.NAME)
    """Column of the provenance entropy. Default: "provenance_entropy", or "prov_entropy"."""
    source_column: str | None = _DATA.free(None, values.NAME)
    """Column of the source class, by which losses and weights are grouped. Default: "source"."""
    weight_column: str | None = _DATA.free(None, values.NAME)
    """Column of an example's own weight, a factor of the loss of its tokens: 0 or more. Default: "weight"."""
    default_weight: float | None = _DATA.free(None, interval(0, 1e15, advice="give 0 to 1e15"))
    """Weight of examples without one. If not given, all examples have a weight or none has."""
    default_authority_weight: float | None = _DATA.free(None, interval(0, MAX_AUTHORITY_WEIGHT))
    """Authority weight of examples without one. If not given, such examples are an error, unless weighting is
    off."""
    default_provenance_entropy: float | None = _DATA.free(None, NON_NEGATIVE)
    """Provenance entropy, in bits, of examples without one. If not given, such examples are an error, unless
    weighting is off."""
    max_record_bytes: int = _DATA.free(
        values.MAX_RECORD_BYTES, interval(1, 2**31 - 1, advice="give 1 to 2^31 - 1")
    )
    """Maximum bytes of a record: of a line, of an element of a JSON list, of the values of a table's row.
    Larger ones are an error: a small compressed file may hold records that fill the memory."""
    on_long: values.OnLong = _DATA.free("truncate")
    """What becomes of examples longer than `max_length`: "truncate" cuts them, and leaves out those whose
    prompt leaves nothing to train; "drop" leaves all of them out; "error" refuses them."""
    strict: bool = _DATA.free(False)
    """Refuse examples whose prompt leaves nothing to train, instead of leaving them out."""
    date: str | None = _DATA.free(None, values.DATE)
    """Day that a chat template prints as today's, such as 2026-11-27. Default: the day on which the run
    began."""
    cache_dir: str | None = _DATA.free(None, values.NAME)
    """Folder for tokenized data. Default: $DISTRUST_CACHE, or the folder distrust in the user's cache
    folder."""

    out: str = _RUN.free("runs/train", values.NAME)
    """Folder of the run. The same command with the same folder resumes the run."""
    from_step: int | None = _RUN.free(None, NON_NEGATIVE)
    """Step of the checkpoint of `out` to resume from. Default: the newest."""
    from_: str | None = _RUN.free(None, values.NAME)
    """Begin a new run with the weights of a run, a checkpoint, or an adapter folder of peft or mlx-lm.
    Options of model, precision, adapter, data and its weighting that are not given are the source's."""
    branch: str | None = _RUN.free(None, values.NAME)
    """Folder of a new run that begins at `from_step`. Required if that is not the newest checkpoint."""
    host: bool = _RUN.free(True)
    """Record the name of this machine in checkpoints, which `distrust show` and the report show."""

    weighting: values.WeightingOption = _WEIGHTING.result("auto")
    """How provenance weighs an example: "monotone", "published" (the squared term, unchanged), or "off".
    "auto" means monotone if examples state provenance or have defaults, else off; the run records which."""
    alpha: float = _WEIGHTING.result(ALPHA, interval(*ALPHA_RANGE))
    """Strength of the empirical distrust term, 2.3 to 3.0."""
    lambda_: float = _WEIGHTING.result(LAMBDA, NON_NEGATIVE)
    """Factor of the term in the weight of an example, 1 + lambda * alpha * term; 0 or more."""
    max_ratio: float | None = _WEIGHTING.result(None, POSITIVE)
    """Maximum ratio between the weights of two examples. Default: no limit."""

    lora_rank: int = _LORA.result(16, interval(0, advice="give 1 or more, or 0 to train all weights"))
    """Rank of the LoRA adapter; 0 trains all weights of the model."""
    lora_alpha: float = _LORA.result(32.0, ABOVE_ZERO)
    """LoRA scale: the output of the adapter is multiplied by alpha / rank."""
    lora_dropout: float = _LORA.result(0.0, BELOW_ONE)
    """Dropout before the adapter: 0 or more, and less than 1."""
    target_modules: tuple[str, ...] = _LORA.result(("all-linear",), Bound(bool, "give at least one name"))
    """Modules that get an adapter: names or their ends, shell patterns ("*_proj"), patterns of full names
    ("re:..."), or "all-linear", which includes the experts of a mixture and leaves out its routers."""
    exclude_modules: tuple[str, ...] = _LORA.result((), if_changed=True)
    """Modules among these that get none, in the same forms."""
    layers: str | None = _LORA.result(None, RANGES, if_changed=True)
    """Layers whose modules get an adapter, from 0, such as "8-15" or "0,4,8-15". Default: all."""
    rslora: bool = _LORA.result(False)
    """Rank-stabilized LoRA: multiply the output of the adapter by alpha / sqrt(rank) instead."""
    dora: bool = _LORA.result(False)
    """DoRA: train the magnitude of each column of a weight separately from its direction."""

    max_steps: int | None = _OPTIMIZATION.free(None, POSITIVE)
    """Optimizer steps of the whole run. Default: the steps of `epochs`."""
    epochs: int = _OPTIMIZATION.free(3, POSITIVE)
    """Passes over the data, if `max_steps` is not given."""
    batch_size: int = _OPTIMIZATION.result(8, POSITIVE)
    """Rows of a micro-batch: examples, or with `packing` rows of up to `max_length` tokens."""
    packing: bool = _OPTIMIZATION.result(False)
    """Fill each row with several whole examples. Attention and positions stay within each example."""
    gradient_accumulation: int = _OPTIMIZATION.result(1, POSITIVE)
    """Micro-batches per optimizer step."""
    learning_rate: float = _OPTIMIZATION.result(2e-4, values.FLOAT32)
    """Peak learning rate."""
    warmup_steps: int = _OPTIMIZATION.result(10, NON_NEGATIVE)
    """Linear warm-up: steps until the learning rate reaches its peak."""
    warmup_ratio: float | None = _OPTIMIZATION.result(None, interval(0, 1))
    """Warm-up as a share of the schedule's steps, 0 to 1, instead of `warmup_steps`."""
    schedule: values.Schedule = _OPTIMIZATION.result("cosine")
    """Learning rate after the warm-up. "wsd" (warm-up, stable, decay) is constant at first: until the decay
    begins, `max_steps` may grow, and the schedule with it."""
    decay_ratio: float = _OPTIMIZATION.result(0.1, interval(0, 1), if_changed=True)
    """Decay of the schedule "wsd", linear, as a share of the schedule's steps, 0 to 1."""
    schedule_steps: int | None = _OPTIMIZATION.result(None, POSITIVE)
    """Steps after which the schedule has ended; fixed when the run begins. Default: max_steps at that
    time."""
    weight_decay: float = _OPTIMIZATION.result(0.0, values.FLOAT32)
    """Weight decay of AdamW, applied to matrices."""
    adam_beta1: float = _OPTIMIZATION.result(0.9, BELOW_ONE)
    """AdamW's decay rate of the first moment."""
    adam_beta2: float = _OPTIMIZATION.result(0.999, BELOW_ONE)
    """AdamW's decay rate of the second moment."""
    adam_epsilon: float = _OPTIMIZATION.result(1e-8, ABOVE_ZERO)
    """AdamW's epsilon."""
    max_grad_norm: float = _OPTIMIZATION.result(1.0, NON_NEGATIVE)
    """Maximum gradient norm; larger gradients are scaled down to it. 0 for no clipping."""
    clipping: values.Clipping = _OPTIMIZATION.result("weighted")
    """How `max_grad_norm` applies to a step: "weighted" multiplies it by the mean weight of the step's
    examples, "plain" uses it unchanged."""
    seed: int = _OPTIMIZATION.result(0, interval(0, 2**63 - 1, advice="give 0 to 2^63 - 1"))
    """Seed of the data order, of the adapter's initial values and of dropout."""

    eval_data: str | tuple[str, ...] | None = _EVALUATION.free(None, values.NAME)
    """Evaluation examples: the same kinds of source as `data`."""
    eval_split: str | None = _EVALUATION.free(None, values.NAME)
    """Split to evaluate on: of `eval_data`, or otherwise of `data`."""
    eval_fraction: float = _EVALUATION.result(0.0, BELOW_ONE)
    """Share of each source to hold out of training, selected by the seed, and to evaluate on."""
    eval_every: int = _EVALUATION.free(50, POSITIVE)
    """Steps between evaluations, if there is evaluation data."""
    eval_at_start: bool = _EVALUATION.free(False)
    """Also evaluate before the first step."""
    metric: str = _EVALUATION.free("eval_loss", values.METRIC)
    """Metric that selects the best checkpoint: any logged metric; for a source class, "eval_loss/CLASS"."""
    metric_mode: MetricMode = _EVALUATION.free("min")
    """Whether a lower or a higher value of `metric` is better."""
    early_stopping_patience: int | None = _EVALUATION.free(None, POSITIVE)
    """Stop after this many evaluations in a row without an improvement of `metric`. Default: never."""

    save_every: str | int = _CHECKPOINTS.free(50, values.SAVE_INTERVAL)
    """Steps between checkpoints (100), or the time between them (30s, 5m, 2h), or "auto": as often as
    `save_budget` allows, and at least every 5 minutes. 0 saves only the final one."""
    save_budget: float = _CHECKPOINTS.free(1.0, interval(0.01, 50))
    """Percent of the time that "auto" may spend on saving, and snapshots in memory on copying."""
    save_bytes_per_day: float = _CHECKPOINTS.free(1000.0, ABOVE_ZERO)
    """GB that "auto" may write per day: a disk wears out, and a bucket costs."""
    keep_last: int = _CHECKPOINTS.free(3, POSITIVE)
    """Number of newest checkpoints to keep."""
    keep_best: int = _CHECKPOINTS.free(1, NON_NEGATIVE)
    """Number of best checkpoints by `metric` to keep in addition."""
    keep_every: int | None = _CHECKPOINTS.free(None, POSITIVE)
    """Keep in addition each checkpoint whose step is a multiple of this."""

    mirror: str | None = _MIRROR.free(None, values.NAME)
    """Where each checkpoint is copied in the background: s3://BUCKET/PREFIX, gs://, az://CONTAINER/PREFIX, or
    a folder. The run resumes from whichever copy is newer. If `out` is a URL, it is the mirror."""
    mirror_keep_last: int | None = _MIRROR.free(None, POSITIVE)
    """Number of newest checkpoints to keep there. Default: `keep_last`."""
    mirror_keep_best: int | None = _MIRROR.free(None, NON_NEGATIVE)
    """Number of best checkpoints to keep there in addition. Default: `keep_best`."""
    mirror_keep_every: int | None = _MIRROR.free(None, POSITIVE)
    """Keep there in addition each checkpoint whose step is a multiple of this. Default: `keep_every`."""
    mirror_timeout: float = _MIRROR.free(600.0, NON_NEGATIVE)
    """Seconds that the end of a run waits until its last checkpoint is copied."""
    take_over: bool = _MIRROR.free(False)
    """Do not wait to see whether another process still writes to the mirror: it is known to be dead."""

    step_snapshots: bool = _FAULTS.free(True)
    """Keep the state of the last step in shared memory: after a crash of the process, the same command on the
    same machine goes on from there. As many steps as `save_budget` allows."""
    on_preemption: tuple[str, ...] = _FAULTS.free((), values.PREEMPTION_NOTICE)
    """Save and end when the machine is about to be taken away: once "file:PATH" exists, "command:LINE"
    succeeds, or the metadata address of "aws", "gcp" or "azure" says so."""
    recheck_every: int | None = _FAULTS.free(None, POSITIVE)
    """Repeat each step whose number is a multiple of this, and compare all bits: a machine that computes
    wrongly is found. Default: never."""
    on_mismatch: values.OnMismatch = _FAULTS.free("stop")
    """What to do if they differ: "stop", or "rewind" to the last good state and go on."""

    report_to: tuple[values.Reporter, ...] = _LOGGING.free(
        (), Bound(lambda names: len(set(names)) == len(names), "give each once")
    )
    """Log to "tensorboard" or "wandb" (Weights & Biases), in addition to metrics.jsonl."""
    log_every: int = _LOGGING.free(10, POSITIVE)
    """Steps between log lines, if the output is not a terminal."""

    engine: values.EngineName = _COMPUTE.bits("auto")
    """Engine that trains: "torch", "mlx", or "auto" for the run's own. For a new run, "auto" selects mlx on
    Apple silicon if it is installed, or if torch is not, and torch otherwise."""
    dtype: values.Dtype = _COMPUTE.result("auto")
    """Precision of the frozen base model and of the computation. "auto" is that of the run; for a new one,
    bfloat16 on CUDA GPUs that have instructions for it, and with mlx on all GPUs, else float32. Trained
    parameters are always float32."""
    device: str = _COMPUTE.bits("auto", values.DEVICE)
    """Device to train on: "cpu", "cuda", one of several GPUs ("cuda:1"), or "mps". "auto" selects CUDA, else
    MPS, else the CPU. With mlx, "mps" is Apple's GPU."""
    threads: int | None = _COMPUTE.bits(None, POSITIVE)
    """CPU threads of torch. Default: those of the machine, or those that the run began with."""
    compile: bool = _COMPUTE.bits(False)
    """Compile the layers with torch, which takes about a minute. On CPUs it requires a C++ compiler and gains
    little. With mlx, steps on a GPU are always compiled."""

    quantization: values.Quantization = _MEMORY.result("none")
    """Bits of the frozen base model: "8bit", "4bit", or "none" for those of `dtype`. Requires LoRA."""
    gradient_checkpointing: bool = _MEMORY.bits(False)
    """Store fewer activations and recompute them: less memory, more time."""
    reload_every: int | None = _MEMORY.free(None, POSITIVE)
    """Steps between memory resets: model and optimizer are dropped and rebuilt, bit for bit. Default:
    never."""
    reload_above: float | None = _MEMORY.free(None, ABOVE_ZERO)
    """GiB, resident on the host or reserved on the device, above which memory is reset."""
    max_memory: float | None = _MEMORY.free(None, ABOVE_ZERO)
    """GiB of the host that no step may exceed: the run saves and stops before."""
    max_device_memory: float | None = _MEMORY.free(None, ABOVE_ZERO)
    """GiB of the device, caches of the allocator included, that no step may exceed: as `max_memory`."""

    reduction: values.Reduction = _RANKS.bits("exact", if_changed=True)
    """How gradients of several processes (ranks) are summed: "exact" in the order of the micro-batches, so
    that the result is the same on any number of ranks; "fast" in the order of the communication library."""
    shard: values.Shard = _RANKS.bits("none", if_changed=True)
    """What is divided among the ranks: "none"; "base", the frozen base model; or "all", weights, gradients
    and moments with --lora-rank 0."""
    rank_timeout: float = _RANKS.free(900.0, ABOVE_ZERO)
    """Seconds after which a rank that does not answer counts as lost: the run ends and can be resumed."""

    def __post_init__(self) -> None:
        wrong, outside = dict[str, str](), dict[str, str]()
        for option in fields(TrainConfig):  # normalized, so that equal values compare equal
            hint, bound = _hints()[option.name], option.metadata["bound"]
            object.__setattr__(self, option.name, to_plain(getattr(self, option.name), hint))
            try:
                value = coerce(getattr(self, option.name), hint)
                object.__setattr__(self, option.name, value)
                if bound is not None and value is not None and not bound.holds(value):
                    outside[option.name] = bound.advice
            except TypeError as error:
                (outside if get_origin(hint) is Literal else wrong)[option.name] = str(error)
        # Values of a wrong type cannot be compared.
        if problems := (wrong or dict(self._conflicts())) | outside:
            raise ConfigError(
                f"{flag(name)} is {as_text(getattr(self, name), repr)}: {problems[name]}"
                for name in _hints()
                if name in problems
            )

    @property
    def run_directory(self) -> Path:
        """The folder that the run writes to; for a URL, one in the cache."""
        return local_folder(self.branch or self.out)

    @property
    def mirror_name(self) -> str | None:
        """The URL or folder that checkpoints are copied to: ``mirror``, or ``out`` if that is a URL."""
        target = self.branch or self.out
        return target if is_url(target) else self.mirror

    def with_effect(self, effect: Effect) -> dict[str, Any]:
        """The options of one effect, by key, as checkpoints record them: see ``if_changed`` of Group."""
        return {
            key(option.name): value
            for option in fields(self)
            if option.metadata["effect"] == effect
            and ((value := getattr(self, option.name)) != option.default or not option.metadata["if_changed"])
        }

    def non_default(self) -> dict[str, Any]:
        """The options that differ from their defaults, by key."""
        return {key(o.name): value for o in fields(self) if (value := getattr(self, o.name)) != o.default}

    def _conflicts(self) -> Iterable[tuple[str, str]]:
        """Names of options that contradict others, and advice."""
        shares, sources = self.mix, len(values.as_names(self.data or values.BUNDLED))
        valid = shares and len(shares) == sources and all(in_range(s, 0) for s in shares) and any(shares)
        if shares is not None and not valid:
            yield "mix", "give a share, 0 or more, for each source of --data, and not only zeros"
        if self.eval_fraction and (self.eval_data or self.eval_split):
            yield "eval_fraction", "give it without --eval-data and --eval-split"
        for name in self.non_default() if self.lora_rank == 0 else ():
            if name in ("rslora", "dora", "target_modules", "exclude_modules", "layers"):
                yield name, "give a --lora-rank; 0 makes no adapter"
        if self.quantization in ("8bit", "4bit") and self.lora_rank == 0:
            yield "quantization", "give --lora-rank 1 or more with it: quantized weights are frozen"
        if self.shard == "all" and self.lora_rank:
            yield "shard", "give --lora-rank 0 with it, or --shard base, which divides an adapter's base"
        if self.shard == "base":
            if self.lora_rank == 0:
                yield "shard", "give a --lora-rank of 1 or more with it: it divides the frozen base"
            for name in sorted({"dora", "quantization", "compile"} & self.non_default().keys()):
                yield name, "leave it out with --shard base"
        if self.branch is not None and self.from_step is None:
            yield "branch", "it requires --from-step"
        elif self.branch is not None and realpath(self.branch) == realpath(self.out):
            yield "branch", "give another one than --out"
        yield from self._misplaced_urls()

    def _misplaced_urls(self) -> Iterable[tuple[str, str]]:
        """Options with a URL that they cannot take, and advice."""
        for name in ("model", "chat_template", "cache_dir"):
            if is_url(getattr(self, name)):
                yield name, "a URL is not understood here; copy it to this machine first"
        for name in ("data", "eval_data", "out", "branch", "from_", "mirror"):
            for value in filter(is_url, values.as_names(getattr(self, name))):
                try:
                    parse(value, flag(name))
                except ConfigError as error:
                    yield name, str(error).removeprefix(f"{flag(name)} ").partition(": ")[2]
        if self.mirror and is_url(self.branch or self.out):
            yield "mirror", "leave it out: --out or --branch is a URL, and that is the mirror"
        if self.mirror_name is None:
            for name in sorted(
                {"mirror_keep_last", "mirror_keep_best", "mirror_keep_every", "mirror_timeout", "take_over"}
                & self.non_default().keys()
            ):
                yield name, "it needs --mirror, or an --out that is a URL"


TrainConfig.__doc__ = Documentation(TrainConfig.__doc__ or "")  # type: ignore[assignment]


def option_docs() -> dict[str, str]:
    """The documentation of each field of :class:`TrainConfig`, as one line."""
    return read_docs(TrainConfig)


def option_groups() -> dict[str, list[Field[Any]]]:
    """The fields of :class:`TrainConfig` by the title of their group, in the order of the help."""
    groups: dict[str, list[Field[Any]]] = {}
    for option in fields(TrainConfig):
        groups.setdefault(option.metadata["group"], []).append(option)
    return groups


def flag(name: str) -> str:
    """The flag of a field, as a user types it."""
    return "--" + key(name).replace("_", "-")


def key(name: str) -> str:
    """The key of a field in a file: ``lambda`` is a keyword of Python only."""
    return name.rstrip("_")


@cache
def _hints() -> dict[str, Any]:
    return get_type_hints(TrainConfig)
