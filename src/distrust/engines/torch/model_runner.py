"""The passes through a model: forward, and backward, of the examples of a micro-batch.

They take the shortest way that this model allows:

- the examples stand one after the other in one row, without padding, and attention stays within each
  (``attention.py``); else they are padded to the longest of them;
- the head is applied to some hundred tokens at a time, and to learned ones alone (``loss.py``); else the
  model makes all logits.

Whether a way gives what the model means is tried once, on a few tokens, and not read off its name: with
packing, no token may move by one bit when another example changes; without the model's own head, what comes
out of the head must be the model's logits, and what goes into it its last hidden state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distrust.contract import Losses
from distrust.data import IGNORED, MicroBatch
from distrust.engines.torch import attention, quantization
from distrust.engines.torch.loss import chunked_losses, token_losses

#: The tokens of the two examples of a trial.
TRIAL = [5, 7]
#: How far a packed example may be from the same alone, beside its largest value.
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 1e-1}


@dataclass(frozen=True, slots=True)
class _Row:
    """A micro-batch as one row, on the host: n tokens of b examples, m of them learned.

    Attributes:
        input_ids: int64[n].
        positions: int64[n], each token's within its example.
        lengths: the tokens of each example.
        places: int64[m], where a learned token's predecessor stands.
        targets: int64[m], the learned token.
        weights: float32[m], its weight.
        examples: int64[m], its example, 0 to b - 1.
    """

    input_ids: np.ndarray[Any, Any]
    positions: np.ndarray[Any, Any]
    lengths: list[int]
    places: np.ndarray[Any, Any]
    targets: np.ndarray[Any, Any]
    weights: np.ndarray[Any, Any]
    examples: np.ndarray[Any, Any]


class ModelRunner:
    """Runs a model.

    Args:
        model: a causal language model of transformers, in evaluation mode; its adapter sits in its layers.
        arithmetic: dtype of the products; another than float32 is by autocast.
        compiled: whether its layers will be compiled.
    """

    def __init__(self, model: Any, *, arithmetic: torch.dtype, compiled: bool = False) -> None:
        self._model = model
        self._compiled = compiled
        self._arithmetic = arithmetic
        self._device: torch.device = model.device
        self._head: Any = model.get_output_embeddings()
        self.chunks = self._can_chunk()
        self.packs = self._can_pack()

    def train(self, batch: MicroBatch, *, tokens: int) -> Losses:
        """Forward and backward: add the gradient of Σ weight · cross-entropy / ``tokens``."""
        row = _row(batch)
        # Until the backward pass is done: a checkpointed layer computes its attention again there.
        with self._packed_row(row):
            total, losses = self._losses(batch, row, scale=1 / tokens)
            total.backward()  # type: ignore[no-untyped-call]
        return _per_example(row, losses, len(batch.examples))

    @torch.no_grad()
    def evaluate(self, batch: MicroBatch) -> Losses:
        """Forward only."""
        row = _row(batch)
        with self._packed_row(row):
            _, losses = self._losses(batch, row, scale=1.0)
        return _per_example(row, losses, len(batch.examples))

    def _losses(self, batch: MicroBatch, row: _Row, *, scale: float) -> tuple[Tensor, Tensor]:
        """The scaled and weighted sum, and the cross-entropy of each learned token: float32[], float32[m]."""
        places, targets = self._to_device(row.places), self._to_device(row.targets)
        scales = self._to_device(row.weights) * scale
        with self._autocast():
            output = self._last(batch, row).index_select(0, places)
        if self.chunks:
            return chunked_losses(output.to(self._arithmetic), self._head, targets, scales)
        losses = token_losses(output, targets)
        return (losses * scales).sum(), losses.detach()

    def _last(self, batch: MicroBatch, row: _Row) -> Tensor:
        """Of each token the last hidden state, or the logits where the model makes them: [n, …]."""
        if self.packs:
            return self._run(
                input_ids=self._to_device(row.input_ids)[None],
                position_ids=self._to_device(row.positions)[None],
            )[0]
        mask = self._to_device(batch.attention_mask)
        return self._run(input_ids=self._to_device(batch.input_ids), attention_mask=mask)[mask.bool()]

    def _run(self, **inputs: Tensor) -> Tensor:
        if self.chunks:
            hidden: Tensor = self._model.base_model(**inputs, use_cache=False).last_hidden_state
            return hidden
        logits: Tensor = self._model(**inputs, use_cache=False).logits
        return logits

    @contextlib.contextmanager
    def _packed_row(self, row: _Row) -> Iterator[None]:
        with attention.examples_of(row.lengths if self.packs else []):
            yield

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._arithmetic is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, self._arithmetic)

    def _to_device(self, array: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    @torch.no_grad()
    def _can_chunk(self) -> bool:
        """Whether hidden state and head are all that makes the logits."""
        if type(self._head) is not torch.nn.Linear or self._model.base_model is self._model:
            return False
        seen: list[Tensor] = []
        hook = self._head.register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0], output]))
        ids = self._trial_ids(0)[None]
        try:
            with self._autocast():
                logits = self._model(input_ids=ids, use_cache=False).logits
                hidden = self._model.base_model(input_ids=ids, use_cache=False)[0]
        except Exception:  # a model whose parts are called otherwise makes its logits itself
            return False
        finally:
            hook.remove()
        if len(seen) != 2:
            return False
        return torch.equal(seen[0], hidden) and torch.equal(seen[1].to(logits.dtype), logits)

    @torch.no_grad()
    def _can_pack(self) -> bool:
        """Whether examples in one row stay among themselves, each as it is alone."""
        before = self._model.config._attn_implementation
        if before != "sdpa":
            return False  # it was chosen for a reason, by the model or by its user
        attention.register(outside_graphs=self._compiled)
        try:
            self._model.set_attn_implementation(attention.NAME)
            with quantization.token_by_token(self._model):
                first, second = torch.split(self._packed(self._trial_ids(0)), TRIAL)
                other_first, _ = torch.split(self._packed(self._trial_ids(1)), TRIAL)
                _, other_second = torch.split(self._packed(self._trial_ids(2)), TRIAL)
                alone = self._packed(self._trial_ids(0)[TRIAL[0] :])
        except Exception:  # a model's code may raise anything where it is run in a way it was not made for
            good = False
        else:
            # The trial with number 1 has another second example, that with number 2 another first one.
            apart = (second - alone).float().abs().max()
            rounding = ROUNDING.get(second.dtype, 0.0) * alone.float().abs().max()
            good = torch.equal(first, other_first) and torch.equal(second, other_second)
            good = good and bool(apart <= rounding)
        if not good:
            self._model.set_attn_implementation(before)
        return good

    def _packed(self, ids: Tensor) -> Tensor:
        lengths = [len(ids)] if len(ids) == TRIAL[1] else TRIAL
        positions = torch.cat([torch.arange(length, device=self._device) for length in lengths])
        with attention.examples_of(lengths), self._autocast():
            return self._run(input_ids=ids[None], position_ids=positions[None])[0]

    def _trial_ids(self, number: int) -> Tensor:
        """Tokens of two examples; with number 1 the second is another one, with number 2 the first."""
        ids = torch.arange(sum(TRIAL), device=self._device)
        changed = (ids >= TRIAL[0]) if number == 1 else (ids < TRIAL[0]) & (number == 2)
        rows: int = self._model.get_input_embeddings().weight.shape[0]
        return (ids + len(ids) * changed) % rows


def _row(batch: MicroBatch) -> _Row:
    real = batch.attention_mask.astype(bool)
    lengths = real.sum(axis=1)
    labels, weights = batch.labels[real], batch.weights[real]
    learned = np.flatnonzero(labels != IGNORED)  # never an example's first: nothing crosses a boundary
    return _Row(
        input_ids=batch.input_ids[real],
        positions=np.concatenate([np.arange(length, dtype=np.int64) for length in lengths]),
        lengths=lengths.tolist(),
        places=learned - 1,
        targets=labels[learned],
        weights=weights[learned],
        examples=np.repeat(np.arange(len(lengths)), lengths)[learned],
    )


def _per_example(row: _Row, losses: Tensor, count: int) -> Losses:
    # Summed in float64 on the host: MPS has no float64, and a sum of thousands of tokens deserves it.
    plain = losses.detach().cpu().numpy().astype(np.float64)
    return Losses(
        cross_entropy=np.bincount(row.examples, weights=plain, minlength=count),
        weighted=np.bincount(row.examples, weights=plain * row.weights, minlength=count),
    )
