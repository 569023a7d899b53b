"""A toy engine in numpy that implements the whole contract of ``distrust/contract.py``.

The model is linear with a softmax: the logits of the next token are a row of a table, selected by the current
token, with dropout. It is as deterministic as the torch engine, and a thousand times faster.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

import numpy as np

from distrust.contract import DeviceMemory, EngineState, Losses, LossSums, accumulate_alone
from distrust.data import IGNORED, MicroBatch
from distrust.errors import ResumeRefused

VOCABULARY = 32
BETA1, BETA2, EPSILON = 0.9, 0.99, 1e-8

#: Options of a short run. Eleven records in steps of four: an epoch does not end where a step does.
TOY: dict[str, Any] = {
    "max_steps": 9,
    "batch_size": 2,
    "gradient_accumulation": 2,
    "learning_rate": 0.05,
    "warmup_steps": 2,
    "save_every": 2,
}


class ToyTokenizer:
    """Maps every byte to one of a few tokens."""

    bos_token_id: int | None = None
    eos_token_id: int | None = 0
    pad_token_id: int | None = None
    chat_template: Any = None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [1 + byte % (VOCABULARY - 1) for byte in text.encode()]

    def apply_chat_template(
        self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool, **options: Any
    ) -> Any:
        raise NotImplementedError


class ToyEngine:
    """Implements ``Engine``."""

    framework: Literal["numpy", "torch"] = "numpy"
    dtype: Literal["float32", "bfloat16"] = "float32"
    context_length: int | None = None
    world_size = 1
    peers = None
    adapted: tuple[str, ...] = ()

    def __init__(
        self,
        *,
        base: int = 0,  # seed of the base model's weights
        dropout: float = 0.25,  # share of the logits that are dropped
        poisoned: Collection[int] = (),  # examples whose loss is NaN
        environment: dict[str, Any] | None = None,  # to report
    ) -> None:
        self.tokenizer = ToyTokenizer()
        self.closed = False
        self.poisoned = set(poisoned)
        self.threads_restored: int | None = None
        self._environment = environment or {"toy": "1", "threads": 1}
        self._base = np.random.default_rng(base).normal(size=(VOCABULARY, VOCABULARY))
        self._dropout = dropout
        self._table = np.zeros((VOCABULARY, VOCABULARY), np.float32)  # trained; added to the frozen base
        self._first = np.zeros_like(self._table)  # Adam's moments
        self._second = np.zeros_like(self._table)
        self._gradient = np.zeros_like(self._table)
        self._updates = 0
        self._rng = np.random.default_rng(0)

    @property
    def parameters(self) -> tuple[int, int]:
        return self._table.size, self._table.size + self._base.size

    def fingerprint(self) -> str:
        return f"toy of {self._base[0, 0]}"

    def environment(self) -> dict[str, Any]:
        return dict(self._environment)

    def restore_environment(self, recorded: dict[str, Any]) -> None:
        self.threads_restored = recorded["threads"]

    @property
    def prepare(self) -> Callable[[MicroBatch], MicroBatch]:
        return lambda batch: batch

    def accumulate(
        self, batches: Sequence[MicroBatch], *, seed: int, step: int, tokens: int
    ) -> Sequence[Losses]:
        return accumulate_alone(self, batches, seed=seed, step=step, tokens=tokens)

    def begin_micro_step(self, *, seed: int, step: int, micro_step: int) -> None:
        if micro_step == 0:
            self._gradient[:] = 0  # an interrupted step may have left some
        self._rng = np.random.default_rng([seed, step, micro_step])  # by these three, and nothing else

    def micro_step(self, batch: MicroBatch, *, tokens: int) -> LossSums:
        keep = self._rng.random(self._table.shape) >= self._dropout
        losses, grad_logits = self._forward(batch, self._table * keep)
        ids, labels, weights = _pad(batch)
        for row, column in np.argwhere(labels[:, 1:] != IGNORED):
            token = ids[row, column]
            weight = weights[row, column + 1]  # of the predicted token
            self._gradient[token] += grad_logits[row, column] * weight * keep[token] / tokens
        return losses

    def clip_gradients(self, max_norm: float) -> float:
        norm = float(np.linalg.norm(self._gradient.astype(np.float64)))
        if max_norm and norm > max_norm:
            self._gradient *= np.float32(max_norm / norm)
        return norm

    def update(self, *, learning_rate: float) -> None:
        self._updates += 1
        self._first = (BETA1 * self._first + (1 - BETA1) * self._gradient).astype(np.float32)
        self._second = (BETA2 * self._second + (1 - BETA2) * self._gradient**2).astype(np.float32)
        first = self._first / (1 - BETA1**self._updates)
        second = self._second / (1 - BETA2**self._updates)
        # In place, as torch does: a checkpoint that shares this array instead of copying it would change.
        self._table -= (learning_rate * first / (np.sqrt(second) + EPSILON)).astype(np.float32)
        self._gradient[:] = 0

    def is_finite(self) -> bool:
        return all(np.isfinite(array).all() for array in (self._table, self._first, self._second))

    def evaluate(self, batch: MicroBatch) -> LossSums:
        return self._forward(batch, self._table)[0]

    def state(self) -> EngineState:
        return EngineState(
            model={"table": self._table},
            optimizer={"moments": [self._first, self._second], "updates": self._updates},
            rng=dict(self._rng.bit_generator.state),
        )

    def load_state(self, state: EngineState) -> None:
        expected = {"table": (self._table.shape, self._table.dtype)}
        if {name: (array.shape, array.dtype) for name, array in state.model.items()} != expected:
            raise ResumeRefused("the checkpoint does not fit the model:", ["its table has another shape"])
        self._table[:] = state.model["table"]
        self._first[:], self._second[:] = state.optimizer["moments"]
        self._updates = state.optimizer["updates"]
        self._rng.bit_generator.state = state.rng

    def checksum(self) -> int:
        return sum(int(array.view(np.int32).sum()) for array in (self._table, self._first, self._second))

    def frozen_checksums(self) -> dict[str, int]:
        return {"base": zlib.crc32(self._base.tobytes())}

    def device_for(self, nbytes: int) -> None:
        pass

    def release_memory(self) -> None:
        pass

    def device_memory(self) -> DeviceMemory | None:
        return None

    def close(self) -> None:
        self.closed = True

    def _forward(self, batch: MicroBatch, table: Any) -> tuple[LossSums, Any]:
        ids, labels, weights = _pad(batch)
        logits = (self._base + table)[ids[:, :-1]]
        shifted = logits - logits.max(axis=2, keepdims=True)  # so that exp does not overflow
        log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=2, keepdims=True))
        labels = labels[:, 1:]
        is_trained = labels != IGNORED
        rows, columns = np.indices(labels.shape)
        target = (rows, columns, np.where(is_trained, labels, 0))  # any index where the label is ignored
        plain = np.where(is_trained, -log_probabilities[target], 0.0)
        plain[np.isin(batch.examples, list(self.poisoned))] *= np.nan
        grad_logits = np.exp(log_probabilities)  # of cross-entropy: softmax minus one-hot
        grad_logits[target] -= 1
        weighted = plain * weights[:, 1:]
        return LossSums(plain.sum(axis=1), weighted.sum(axis=1)), grad_logits


def _pad(batch: MicroBatch) -> tuple[Any, Any, Any]:
    """Token ids, labels and weights, [b, t] each."""
    ids, labels = batch.pad(batch.input_ids, filler=0), batch.pad(batch.labels, filler=IGNORED)
    return ids, labels, batch.pad(batch.weights, filler=0)
