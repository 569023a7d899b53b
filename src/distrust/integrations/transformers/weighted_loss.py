"""Weights of examples in the loss of transformers' Trainer and TRL's SFTTrainer.

The collator turns the number of each row's example into a weight per token, at the place of its label. The
loss of a step is Σ u·ce / Σ 1 over the trained tokens of all micro-batches; Σ 1 is ``num_items_in_batch``.
"""

from __future__ import annotations

from copy import copy
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import concatenate_datasets
from torch.nn.functional import cross_entropy, pad

from distrust.errors import ConfigError, DataError
from distrust.weighting import ALPHA, LAMBDA, Weighting, example_weights, normalize

TESTED_VERSIONS = "transformers 5.23 and 5.24, and trl 1.16"  # DistrustCheckpoints needs less
COLUMN = "distrust_weights"  # in the data the number of the example, by row or token; in a batch the weights
COLUMNS = ("authority_weight", "provenance_entropy", "weight")


def weighted(
    trainer: Any,
    dataset: Any = None,
    *,
    weighting: Weighting = "monotone",
    alpha: float = ALPHA,
    lambda_: float = LAMBDA,
    max_ratio: float | None = None,
) -> Any:
    """Weigh the training loss of a Trainer or SFTTrainer by columns of its data; evaluation stays unweighted.

    The columns are ``authority_weight`` and ``provenance_entropy``, or a factor ``weight``, or all three. The
    weights are divided by their mean over the trained tokens. ``max_grad_norm`` is multiplied by the mean
    weight of a step's tokens, or clipping would undo them. If all are equal, the trainer stays as it is.

    Args:
        trainer: a trainer whose data is a ``datasets.Dataset``.
        dataset: the data that it was built with, if it packs: packing drops the columns.
        weighting: as all that follows, see ``distrust.weighting.example_weights``.
        alpha: α.
        lambda_: λ.
        max_ratio: limits the weights.

    Raises:
        ConfigError: the trainer or an option is not supported.
        DataError: a column is missing, or a value is missing or out of range.
    """
    _require_supported(trainer)
    data, examples = _number_examples(trainer, dataset)
    columns = {name: _column(examples, name) for name in COLUMNS if name in examples.features}
    provenance = [columns[name] for name in COLUMNS[:2] if name in columns]
    if len(provenance) == 1 or not columns:
        raise DataError(f"the data needs {' and '.join(COLUMNS[:2])}, or weight: {[*examples.features]}")
    u = columns.get("weight", np.ones(len(examples)))
    if provenance:
        options: Any = {"weighting": weighting, "alpha": alpha, "lambda_": lambda_, "max_ratio": max_ratio}
        u *= example_weights(*provenance, **options)
    if (normalize(u, tokens=np.ones_like(u)) == 1).all():  # first: a collator may draw random numbers
        return trainer
    number = partial(_collate, trainer.data_collator, torch.arange(len(u)))
    u = normalize(u, tokens=_count_tokens(trainer, data, number))
    trainer.data_collator = partial(_collate, trainer.data_collator, torch.from_numpy(u.astype(np.float32)))
    trainer.train_dataset, trainer.distrust_weights = data, f"{u.min()} to {u.max()}"  # kept in checkpoints
    _replace_loss(trainer)
    return trainer


def _collate(collate: Any, values: torch.Tensor, rows: list[dict[str, Any]]) -> Any:
    """Collate rows, and put the values [n] of their examples where the labels of their tokens are."""
    batch = collate([{key: row[key] for key in row if key != COLUMN} for row in rows])
    if COLUMN in rows[0]:  # evaluation data has no numbers
        numbers = [torch.as_tensor(row[COLUMN]).expand(len(row["input_ids"])) for row in rows]
        if len(batch["labels"]) == 1:  # maybe flattened to one row
            numbers = [torch.cat(numbers)]
        # Padding repeats the last number: a row that is one example may be padded on either side.
        length = batch["labels"].shape[1]
        batch[COLUMN] = values[torch.stack([torch.cat([n, n[-1:].expand(length)])[:length] for n in numbers])]
    return batch


def _replace_loss(trainer: Any) -> None:
    """Let a trainer weigh the losses of tokens, and clip so that this is not undone."""
    compute_loss, clip_grad_norm = trainer.compute_loss, trainer.accelerator.clip_grad_norm_
    mean: list[Any] = [0.0]  # weight of the step's tokens, over its micro-batches so far

    def compute(model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        weights = inputs.pop(COLUMN, None)
        if weights is not None and trainer.model.training:
            total = (weights * (inputs["labels"] >= 0))[:, 1:].sum()
            mean[0] = mean[0] + total / options["num_items_in_batch"].clamp(min=1)
            model = partial(_weighted_outputs, model, weights)  # all that the trainer does is call it
        return compute_loss(model, inputs, *args, **options)

    def clip(parameters: Any, max_norm: float, *args: Any, **options: Any) -> Any:
        factor, mean[0] = float(mean[0]) or 1.0, 0.0
        return clip_grad_norm(parameters, max_norm * factor, *args, **options)

    trainer.compute_loss, trainer.accelerator.clip_grad_norm_ = compute, clip


def _weighted_outputs(model: Any, weights: torch.Tensor, **inputs: Any) -> Any:
    """The outputs of a causal language model whose loss is weighted; ``weights`` is float32[b, t]."""
    if inputs.get("fused_lm_head"):  # SFTTrainer sums the log-probabilities of the tokens
        outputs = model(**inputs)
        outputs["log_probs"] = outputs.log_probs * weights[:, 1:]
        return outputs
    labels, tokens = inputs.pop("labels"), inputs.pop("num_items_in_batch")
    outputs = model(**inputs)
    targets = pad(labels, (0, 1), value=-100)[:, 1:].flatten()  # shifted; the logits are not copied
    losses = cross_entropy(outputs.logits.float().flatten(0, 1), targets, reduction="none")
    outputs["loss"] = (losses * pad(weights, (0, 1))[:, 1:].flatten()).sum() / tokens
    return outputs


def _require_supported(trainer: Any) -> None:
    """Raise ConfigError if the loss of a trainer cannot be weighted."""
    args, data, model = trainer.args, trainer.train_dataset, trainer.model
    loss = trainer.compute_loss.__module__
    data_format = getattr(data, "format", {"type": "custom"})["type"]  # "custom" of a Dataset: a transform
    counts_targets = trainer.model_accepts_loss_kwargs and getattr(trainer, "_loss_shifts_labels", False)
    reasons = {
        "computes its own loss": loss not in ("transformers.trainer", "trl.trainer.sft_trainer"),
        f"trains on a {type(data).__name__}, no plain datasets.Dataset": data_format == "custom",
        "has label smoothing or compute_loss_func": args.label_smoothing_factor or trainer.compute_loss_func,
        "has another loss_type than nll": getattr(args, "loss_type", "nll") != "nll",
        "uses a liger kernel": args.use_liger_kernel,
        "counts other tokens than a causal language model trains": not counts_targets,
        "is one of an earlier trl": loss[:3] == "trl" and not hasattr(trainer, "_formatting_func"),
        "adds a router's loss": loss[:3] != "trl" and getattr(model.config, "output_router_logits", False),
        "trains a prompt": getattr(getattr(model, "active_peft_config", 0), "is_prompt_learning", 0),
        "uses several processes or devices": args.world_size > 1 or args.n_gpu > 1,
    }
    if present := [reason for reason, applies in reasons.items() if applies]:
        name = type(trainer).__name__
        raise ConfigError(f"weighted() takes no {name} that {present[0]}; tested: {TESTED_VERSIONS}")


def _number_examples(trainer: Any, dataset: Any) -> tuple[Any, Any]:
    """The training data with the numbers of its examples, and data with a row for each example."""
    data, args, tokenizer = trainer.train_dataset, trainer.args, trainer.processing_class
    is_packed = getattr(args, "packing", False) and not trainer._skip_prepare_dataset
    if is_packed != (dataset is not None):
        raise ConfigError("weighted(trainer, dataset) needs the dataset if the trainer packs, and only then")
    if not is_packed:
        return data.add_column(COLUMN, np.arange(len(data))), data
    prepare, uncut = trainer._prepare_dataset, copy(args)
    uncut.max_length, uncut.shuffle_dataset = None, False  # done below, with the packing
    examples = prepare(dataset, tokenizer, uncut, False, trainer._formatting_func, "train")
    numbers = examples.map(lambda row, i: {"labels": [i] * len(row["input_ids"])}, with_indices=True)
    numbers = prepare(numbers, tokenizer, args, True, None, "train")  # packs labels, whatever they are
    ids = [part.select_columns(["input_ids"]).with_format("arrow").iter(1000) for part in (data, numbers)]
    if len(data) != len(numbers) or any(a != b for a, b in zip(*ids, strict=True)):
        raise ConfigError("the dataset given to weighted() is not the one that the trainer was built with")
    numbers = numbers.select_columns(["labels"]).rename_column("labels", COLUMN)
    return concatenate_datasets([data, numbers], axis=1), examples


def _column(data: Any, name: str) -> np.ndarray[Any, Any]:
    """A column of numbers, float64[n]; NaN where one is missing."""
    if not str(getattr(data.features[name], "dtype", "")).startswith(("float", "int", "uint")):
        raise DataError(f"column {name} of the training data must have numbers, not {data.features[name]}")
    return np.array(data.select_columns([name]).with_format("arrow")[:][name].to_numpy(), np.float64)


def _count_tokens(trainer: Any, data: Any, collate: Any) -> np.ndarray[Any, Any]:
    """How many tokens of each of n examples are trained in a pass over the data, int64[n]."""
    trainer._set_signature_columns_if_needed()
    trainer._signature_columns = [*trainer._signature_columns, COLUMN]  # the Trainer drops other columns
    counts = np.zeros(len(collate.args[1]), np.int64)
    for row in trainer._remove_unused_columns(data):
        batch = collate([row])  # not the rows themselves: collators make labels, too
        np.add.at(counts, batch[COLUMN][:, 1:][batch["labels"][:, 1:] >= 0].numpy(), 1)
    return counts
