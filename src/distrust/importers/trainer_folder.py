"""A checkpoint folder of transformers' Trainer as a checkpoint of ours, which a run goes on from.

The Trainer names weights but numbers the optimizer's moments. Which number is which weight follows from the
order of the model's parameters, so the model is built, without its weights: its names and shapes have to be
exactly those of the folder, and every moment has the shape of its weight. The optimizer has two groups,
decayed and not. Either all parameters are in one, or the matrices are in the first and the vectors in the
second; any other division shows in the size of a group or in a shape, and is refused.

Nothing is unpickled but tensors: ``training_args.bin`` and ``rng_state.pth`` are never opened.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distrust import config as options
from distrust.checkpoint import Checkpoint
from distrust.engines.lora_config import LoraConfig
from distrust.engines.torch import adapter
from distrust.engines.torch.model import meta_model
from distrust.engines.torch.optimizer import MOMENTS, make_optimizer
from distrust.errors import CorruptCheckpoint, ModelError, ResumeRefused, quote_untrusted
from distrust.importers import safe_tensors
from distrust.importers.detect import ADAPTER_CONFIG, PEFT_WEIGHTS, TRAINER_STATE
from distrust.importers.safe_read import read_json
from distrust.run_record import imported_run
from distrust.training.imported import MAX_STEP

FORMAT, ADAPTER_FORMAT = "transformers Trainer", "peft adapter"

OPTIMIZER = "optimizer.pt"
WEIGHTS = "model.safetensors"

MAX_STATE_BYTES = 256 << 20
MAX_CONFIG_BYTES = 4 << 20
MAX_NAME_CHARACTERS = 1000
#: How many a message names of many.
NAMES_SHOWN = 3

#: Folders that are another thing, by a name in them.
_OTHER_KINDS = {
    "zero_to_fp32.py": "DeepSpeed wrote it, and divided its state among processes",
    "optimizer_0": "FSDP wrote it, and divided its state among processes",
    "pytorch_model_fsdp_0": "FSDP wrote it, and divided its state among processes",
    "pytorch_model_fsdp.bin": "FSDP wrote it, as pickles",
    "model.safetensors.index.json": "its model is divided among files; it is read from one only",
    "adapter_model.bin": "its adapter is a pickle, which can run any code when it is read",
    "pytorch_model.bin": "its model is a pickle, which can run any code when it is read",
}
#: What is taken from an adapter's config: theirs -> ours.
_TAKEN = {
    "r": "lora_rank",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "use_rslora": "rslora",
    "use_dora": "dora",
}
#: What else may stand there: it changes nothing of what is trained, or is looked at by itself.
_HARMLESS = {
    *("base_model_name_or_path", "revision", "peft_type", "peft_version", "task_type", "auto_mapping"),
    *("inference_mode", "runtime_config", "target_modules", "fan_in_fan_out", "layers_pattern"),
    *("init_lora_weights", "bias", "megatron_core", "qalora_group_size", "ensure_weight_tying"),
}
#: Every other way to begin changes the base model, too.
_PLAIN_BEGINNINGS = (True, False, None, "gaussian", "orthogonal")
_ADAPTED = re.compile(
    r"base_model\.model\.(.+)\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)(?:\.weight)?"
)
#: Options that the optimizer's own file tells: they are taken over with the moments.
_OF_THE_OPTIMIZER = ("adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay")
#: The Trainer's names for what it logs of a step -> ours.
_LOGGED = {"loss": "loss", "grad_norm": "gradient_norm", "learning_rate": "learning_rate"}


def read(folder: Path, *, model: str | None = None) -> Checkpoint:
    """What the Trainer saved, as the torch engine here takes it.

    Weights and moments come as float32: bfloat16 and float16 are widened, which is exact. ``config`` has
    only the options that the folder is certain about; the run that goes on brings the others. ``history``
    has what was logged, at its step: float64[step], NaN where nothing was.

    Args:
        folder: such as ``output/checkpoint-500``.
        model: the base model, a folder or a hub name. Default: the one that the adapter names; for a whole
            model, the folder itself.

    Raises:
        CheckpointError: for files that are missing, damaged, too large, or hold pickled objects.
        ModelError: if the base model's config cannot be loaded.
        ResumeRefused: for training of a kind that is not done here, or that does not fit the model.
        ConfigError: for values that no option here takes.
    """
    has_adapter = any(map(os.path.lexists, (folder / PEFT_WEIGHTS, folder / ADAPTER_CONFIG)))
    for name, what in _OTHER_KINDS.items():
        if os.path.lexists(folder / name) and not os.path.lexists(folder / PEFT_WEIGHTS):
            raise _refused(folder, f"{what} ({name})")
    state = read_json(folder / TRAINER_STATE, max_bytes=MAX_STATE_BYTES)
    step = _count(state, "global_step", folder)
    trained = (_adapter if has_adapter else _whole)(folder, model)
    optimizer, known, left = _optimizer(folder, trained, step=step)
    return Checkpoint(
        step=step,
        model=trained.weights,
        optimizer=optimizer,
        history=_history(state, step),
        config={**trained.known, **known},
        metadata=_tokens(state, folder),
        metrics=_metrics(state, step),
        run=imported_run(FORMAT, dropped=left, model=trained.base, trainer=_told(state)),
    )


def read_adapter(folder: Path, *, model: str | None = None) -> Checkpoint:
    """An adapter folder of peft as a checkpoint at step 0, which a run begins from.

    Args and errors: those of :func:`read`.
    """
    trained = _adapter(folder, model)
    optimizer, known, left = _optimizer(folder, trained, step=0)
    return Checkpoint(
        step=0,
        model=trained.weights,
        optimizer=optimizer,
        config={**trained.known, **known},
        run=imported_run(ADAPTER_FORMAT, dropped=left, model=trained.base),
    )


@dataclass(frozen=True, slots=True)
class _Trained:
    """What is trained.

    Attributes:
        base: the model that it was built from.
        known: options, by key.
        parameters: of the model without its weights: only names, order and shapes count.
        weights: float32, by the same names.
    """

    base: str
    known: Mapping[str, Any]
    parameters: dict[str, torch.nn.Parameter]
    weights: Mapping[str, torch.Tensor]


def _whole(folder: Path, base: str | None) -> _Trained:
    base = str(folder) if base is None else base
    saved = safe_tensors.read_tensors(folder / WEIGHTS)
    hollow = meta_model(base)
    parameters = dict(hollow.named_parameters())
    # Shared weights have several names, and may be saved under any of them, or all.
    others = dict(hollow.named_parameters(remove_duplicate=False)).keys() - parameters.keys()
    _require_same(folder, base, saved.keys() - others, parameters.keys())
    return _Trained(base, {"lora_rank": 0}, parameters, _weights(folder / WEIGHTS, saved, parameters))


def _adapter(folder: Path, base: str | None) -> _Trained:
    path = folder / PEFT_WEIGHTS
    described = read_json(folder / ADAPTER_CONFIG, max_bytes=MAX_CONFIG_BYTES)
    _require_plain_lora(described, folder, base_given=base is not None)
    saved = safe_tensors.read_tensors(path)
    modules = {_module(name, folder) for name in saved}
    rank = described.get("r")
    ranks = {value.shape[:1] for name, value in saved.items() if "lora_A" in name or "embedding_A" in name}
    if type(rank) is not int or ranks != {(rank,)}:
        # Seen before anything is made as large as a file claims.
        raise _refused(folder, f"its weights are not of the rank that {ADAPTER_CONFIG} says")
    base, bare = _found_base(described, folder) if base is None else (base, meta_model(base))
    if not modules <= dict(bare.named_modules()).keys():
        raise _refused(folder, f"it adapts modules that --model {base} does not have")
    known = {ours: described[theirs] for theirs, ours in _TAKEN.items() if described.get(theirs) is not None}
    for targets in _ways_to_name(modules):
        config = options.from_mapping(
            {**known, "target_modules": targets}, where=str(folder / ADAPTER_CONFIG)
        )
        hollow = adapter.add_adapter(meta_model(base), LoraConfig.from_options(config))
        parameters = adapter.trained_parameters(hollow)
        # Under peft's names, the parameters themselves: which is which is told by identity.
        theirs_of = {id(value): name for name, value in adapter.to_peft_names(hollow, parameters).items()}
        if set(theirs_of.values()) == saved.keys():
            break
    _require_same(folder, base, saved.keys(), theirs_of.values())
    named = {name: saved[theirs_of[id(parameter)]] for name, parameter in parameters.items()}
    taken = config.with_effect("result")
    known = {name: taken[name] for name in (*_TAKEN.values(), "target_modules")}
    return _Trained(base, known, parameters, _weights(path, named, parameters))


def _require_plain_lora(described: Mapping[str, Any], folder: Path, *, base_given: bool) -> None:
    if described.get("peft_type") != "LORA" or described.get("task_type") not in ("CAUSAL_LM", None):
        raise _refused(folder, "its adapter is not a LoRA of a causal language model")
    for name, value in described.items():
        if name not in _HARMLESS and name not in _TAKEN and value:
            raise _refused(folder, f"{ADAPTER_CONFIG} sets {quote_untrusted(name)}, which is not done here")
    if described.get("bias") not in ("none", None):
        raise _refused(folder, f"{ADAPTER_CONFIG} sets bias: biases are not trained here")
    beginning = described.get("init_lora_weights")
    if not any(beginning is plain or beginning == plain for plain in _PLAIN_BEGINNINGS):
        raise _refused(
            folder, f"{ADAPTER_CONFIG} sets init_lora_weights, by which the base model was changed"
        )
    if described.get("revision") and not base_given:
        raise _refused(folder, "its base model is of a certain revision; give a folder of that as --model")


def _found_base(described: Mapping[str, Any], folder: Path) -> tuple[str, torch.nn.Module]:
    """The base model that an adapter names, and itself without its weights."""
    name = described.get("base_model_name_or_path")
    if type(name) is not str or not 0 < len(name) <= MAX_NAME_CHARACTERS or not name.isprintable():
        raise _refused(folder, f"{ADAPTER_CONFIG} does not name the base model; give it as --model")
    try:
        return name, meta_model(name)
    except ModelError as error:
        raise ModelError(
            f"{folder}: its base model {quote_untrusted(name)} cannot be loaded from here; say where it "
            f"lies with --model ({error})"
        ) from error


def _module(name: str, folder: Path) -> str:
    found = _ADAPTED.fullmatch(name)
    if found is None:
        raise _refused(
            folder, f"{PEFT_WEIGHTS} holds {quote_untrusted(name)}, which is no part of a plain LoRA"
        )
    return found[1]


def _ways_to_name(modules: Collection[str]) -> Sequence[list[str]]:
    """What ``target_modules`` may have been, the shortest first."""
    return [["all-linear"], sorted({name.rpartition(".")[2] for name in modules}), sorted(modules)]


def _weights(
    path: Path, saved: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    return {
        name: safe_tensors.as_float32(
            saved[name], shape=parameter.shape, what=quote_untrusted(name), path=path
        )
        for name, parameter in parameters.items()
    }


def _require_same(folder: Path, base: str, saved: Collection[str], built: Collection[str]) -> None:
    for there, here, missing in ((saved, built, "the model has not"), (built, saved, "the folder has not")):
        found = sorted(set(there) - set(here))
        if found:
            raise _refused(folder, f"it does not fit --model {base}: {missing} {_some(found)}")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(map(quote_untrusted, names[:NAMES_SHOWN])) + more


def _optimizer(
    folder: Path, trained: _Trained, *, step: int
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """AdamW's state by our groups, the options it tells, and what of it is not taken over."""
    path = folder / OPTIMIZER
    if not os.path.lexists(path):
        return {}, {}, []
    saved = safe_tensors.read_pickled(path)
    groups, state = _parts(saved, path)
    known = _options_of(groups, path)
    config = options.from_mapping({**trained.known, **known}, where=str(path))
    ours = make_optimizer(trained.parameters, config).state_dict()
    names = _names(groups, trained.parameters, path)
    if state.keys() != names.keys():
        there, here = sorted(map(repr, state)), sorted(map(repr, names))
        raise _refused(
            path,
            f"has the moments of {len(there)} parameters ({_some(there)}), and its groups name "
            f"{len(here)} ({_some(here)})",
        )
    moments = {}
    for number, name in names.items():
        moments[name] = _moments(state[number], name, trained.parameters[name].shape, path, step=step)
    ordered = [name for group in ours["param_groups"] for name in group["param_names"]]
    ours["state"] = {number: moments[name] for number, name in enumerate(ordered)}
    left = []
    if known["weight_decay"] and any(
        trained.parameters[name].ndim < 2 for name in list(names.values())[: len(groups[0]["params"])]
    ):
        left.append("the weight decay of vectors: here only matrices are decayed")
    return ours, {name: getattr(config, name) for name in _OF_THE_OPTIMIZER}, left


def _parts(saved: Any, path: Path) -> tuple[list[dict[str, Any]], dict[int, Any]]:
    groups = saved.get("param_groups") if isinstance(saved, dict) else None
    state = saved.get("state") if isinstance(saved, dict) else None
    if (
        type(groups) is not list
        or type(state) is not dict
        or not groups
        or not all(type(group) is dict and type(group.get("params")) is list for group in groups)
    ):
        raise CorruptCheckpoint("not the state of an optimizer of torch", path=path)
    return [group for group in groups if group["params"]] or groups[:1], state


def _options_of(groups: Sequence[Mapping[str, Any]], path: Path) -> dict[str, Any]:
    found = []
    for group in groups:
        betas: Any = group.get("betas")
        if (
            type(betas) not in (tuple, list)
            or len(betas) != 2
            or group.get("decoupled_weight_decay") is False
            or group.get("maximize")
            or group.get("amsgrad")
        ):
            raise _not_adamw(path)
        found.append({"adam_beta1": betas[0], "adam_beta2": betas[1], "adam_epsilon": group.get("eps")})
    decays = [group.get("weight_decay") for group in groups]
    if len(groups) > 2 or any(other != found[0] for other in found) or any(decays[1:]):
        raise _refused(path, "its parameters are in groups with options of their own, which is not done here")
    return {**found[0], "weight_decay": decays[0]}


def _names(
    groups: Sequence[Mapping[str, Any]], parameters: Mapping[str, torch.nn.Parameter], path: Path
) -> dict[int, str]:
    """Number -> name. Shapes are compared later: with them, no vector can be taken for a matrix."""
    if len(groups) == 1:
        divided = [list(parameters)]
    else:
        divided = [
            [name for name, parameter in parameters.items() if (parameter.ndim >= 2) == matrices]
            for matrices in (True, False)
        ]
    if [len(names) for names in divided] != [len(group["params"]) for group in groups]:
        counts = " and ".join(str(len(group["params"])) for group in groups)
        raise _refused(path, f"its groups have {counts} parameters, the model's matrices and vectors others")
    pairs = [
        pair
        for group, names in zip(groups, divided, strict=True)
        for pair in zip(group["params"], names, strict=True)
    ]
    if not all(type(number) is int for number, _ in pairs) or len(dict(pairs)) != len(pairs):
        raise CorruptCheckpoint("its parameters are not numbered", path=path)
    return dict(pairs)


def _moments(values: Any, name: str, shape: torch.Size, path: Path, *, step: int) -> dict[str, torch.Tensor]:
    if type(values) is not dict or values.keys() != {"step", *MOMENTS}:
        raise _not_adamw(path)
    made = values["step"]
    if type(made) is torch.Tensor and made.numel() == 1 and made.device.type == "cpu":
        made = made.item()
    if type(made) not in (int, float) or not 0 < made <= step:
        raise CorruptCheckpoint(f"{name}: made {quote_untrusted(repr(made))} of {step} steps", path=path)
    found = {
        part: safe_tensors.as_float32(values[part], shape=shape, what=f"{part} of {name}", path=path)
        for part in MOMENTS
    }
    if bool((found["exp_avg_sq"] < 0).any()):
        raise CorruptCheckpoint(f"exp_avg_sq of {name} is less than 0", path=path)
    return {"step": torch.tensor(float(made), dtype=torch.float32), **found}


def _count(state: Mapping[str, Any], name: str, folder: Path, *, missing: int | None = None) -> int:
    value = state.get(name, missing)
    if type(value) is not int or not 0 <= value <= (MAX_STEP if missing is None else 1 << 62):
        raise CorruptCheckpoint(f"{name} is {quote_untrusted(repr(value))}", path=folder / TRAINER_STATE)
    return value


def _tokens(state: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """How many it has seen; unless it was asked to, the Trainer does not count them and says 0."""
    seen = _count(state, "num_input_tokens_seen", folder, missing=0)
    return {"tokens_seen": seen} if seen else {}


def _logged(state: Mapping[str, Any], step: int) -> list[tuple[int, dict[str, float]]]:
    """The lines of its log that are whole: step -> numbers."""
    lines = state.get("log_history")
    found = []
    for line in lines if type(lines) is list else []:
        at = line.get("step") if type(line) is dict else None
        if type(at) is int and 1 <= at <= step:
            found.append((at, {name: value for name, value in line.items() if type(value) is float}))
    return found


def _history(state: Mapping[str, Any], step: int) -> dict[str, np.ndarray[Any, Any]]:
    """float64[step]; the loss is the mean since the line before, as the Trainer logs it."""
    columns = {ours: np.full(step, np.nan) for ours in _LOGGED.values()}
    for at, values in _logged(state, step):
        for theirs, ours in _LOGGED.items():
            if theirs in values:
                columns[ours][at - 1] = values[theirs]
    return columns


def _metrics(state: Mapping[str, Any], step: int) -> dict[str, float]:
    last: dict[str, float] = {}
    for at, values in _logged(state, step):
        if at == step:
            last |= {
                ours: values[name]
                for name, ours in {**_LOGGED, "eval_loss": "eval_loss"}.items()
                if name in values
            }
    return {name: value for name, value in last.items() if math.isfinite(value)}


def _told(state: Mapping[str, Any]) -> dict[str, float]:
    """What is worth knowing later, and changes nothing."""
    names = ("epoch", "best_metric", "max_steps")
    return {
        name: state[name]
        for name in names
        if type(state.get(name)) in (int, float) and abs(state[name]) < 1e300
    }


def _not_adamw(path: Path) -> ResumeRefused:
    return _refused(
        path, "not the state of AdamW with whole moments (8-bit and other optimizers are not read)"
    )


def _refused(path: Path, why: str) -> ResumeRefused:
    return ResumeRefused(f"{path}: cannot be gone on with here: {why}")
