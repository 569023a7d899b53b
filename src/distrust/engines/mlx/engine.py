"""MlxEngine: the contract of ``training/engine.py`` on mlx and mlx-lm.

As in the engine of torch, what is trained is float32, and so are its moments; bfloat16 is for the frozen
base and for the arithmetic. With rank 0 all weights are trained, in float32. The trained arrays are held here
by name and handed to each pass; the model is what they are put into.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, Literal

import mlx.core as mx
from mlx_lm.utils import get_total_parameters

from distrust.checkpoint.memory import return_freed_memory
from distrust.config import TrainConfig
from distrust.contract import DEFAULT_MAX_LENGTH, EngineState, Losses, MemoryUse
from distrust.data import MicroBatch, Tokenizer
from distrust.engines import state_conversion, tokenizer
from distrust.engines.fingerprint import fingerprint
from distrust.engines.mlx import adapter, compiling, device_memory, linear_by_columns, model, randomness
from distrust.engines.mlx.checkpointing import checkpoint_layers
from distrust.engines.mlx.model_runner import ModelRunner
from distrust.engines.mlx.optimizer import AdamW
from distrust.engines.out_of_memory import translate_out_of_memory
from distrust.errors import DistrustWarning


class MlxEngine:
    """A language model of mlx-lm with its LoRA layers, and AdamW.

    mlx's arrays belong to the thread that made them: an engine is used in one thread.

    Args:
        config: what to load and how to train it.

    Raises:
        ModelError: if the model or tokenizer cannot be loaded.
        ConfigError: if an option does not fit the model or the machine.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._device = model.choose_device(config.device)
        mx.set_default_device(self._device)
        return_freed_memory()
        self._tokenizer = tokenizer.load_tokenizer(config.model)
        self._model, self._config = model.load_model(
            config.model, dtype=config.dtype if config.lora_rank else "float32"
        )
        rows = model.text_of(self._config, "vocab_size")
        tokenizer.require_room_for(self._tokenizer, rows or len(self._tokenizer), name=config.model)
        self._fingerprint = fingerprint(model.named_weights(self._model))
        model.quantize(self._model, config.quantization)
        self._context_length: int | None = model.text_of(self._config, "max_position_embeddings")
        self._gradient_checkpointing = config.gradient_checkpointing
        self._columns = linear_by_columns.is_faster(self._device) and bool(config.lora_rank)
        if self._columns:
            linear_by_columns.use_columns(self._model)
        self._compiled = compiling.should_compile(config, self._device)
        base = get_total_parameters(self._model)  # it knows how many a packed one holds
        self._adapt(config)
        if config.gradient_checkpointing:
            checkpoint_layers(self._model)
        self._trained = adapter.trained_parameters(self._model)
        mx.eval(self._trained)
        trained = sum(array.size for array in self._trained.values())
        self._parameters = trained, base + trained if config.lora_rank else base
        whole = not config.lora_rank and config.dtype != "float32"
        self._passes = ModelRunner(
            self._model,
            arithmetic=getattr(mx, config.dtype) if whole else None,
            frozen_head=all(".layers." in f".{name}" for name in self._trained),
            by_columns=self._columns,
            compiled=self._compiled,
        )
        self._warn_of_window(config)
        self._optimizer = AdamW(self._trained, config, compile=self._compile)
        self._gradients: dict[str, mx.array] | None = None

    @property
    def framework(self) -> Literal["mlx"]:
        """Of the arrays that :meth:`load_state` takes."""
        return "mlx"

    @property
    def tokenizer(self) -> Tokenizer:
        """The base model's, of transformers."""
        found: Tokenizer = self._tokenizer
        return found

    @property
    def model(self) -> Any:
        """The model with its adapter, as it is now."""
        self._passes.put(self._trained)
        return self._model

    @property
    def config(self) -> dict[str, Any]:
        """The model's own."""
        return self._config

    @property
    def context_length(self) -> int | None:
        """Tokens that the model can see at once, if its config says."""
        return self._context_length

    @property
    def parameters(self) -> tuple[int, int]:
        """How many numbers are trained, and how many there are."""
        return self._parameters

    def fingerprint(self) -> str:
        """BLAKE3 of the base model's weights as they were loaded, before any quantization."""
        return self._fingerprint

    def environment(self) -> dict[str, Any]:
        """What may change the last bits."""
        return {
            "engine": "mlx",
            "mlx": version("mlx"),
            "mlx_lm": version("mlx-lm"),
            "device": self._device_name(),
            "model_config_mlx": model.config_digest(self._config),
            "attention": "rows shared" if self._passes.packs else "a row each",
            "loss": "in chunks" if self._passes.chunks else "of all logits",
            "products": "by columns" if self._columns else "by rows",
            "gradient_checkpointing": self._gradient_checkpointing,
            "compiled": self._compiled,
        }

    def restore_environment(self, recorded: dict[str, Any]) -> None:
        """Nothing of it can be chosen: mlx has no number of threads."""

    def begin_micro_step(self, *, seed: int, step: int, micro_step: int) -> None:
        """Seed the generator; the first micro-step begins without gradients."""
        if micro_step == 0:
            self._gradients = None
        randomness.reseed(seed=seed, step=step, micro_step=micro_step)

    def micro_step(self, batch: MicroBatch, *, tokens: int) -> Losses:
        """Forward and backward: add the gradient of Σ weight · cross-entropy / ``tokens``."""
        with translate_out_of_memory("alloc", "out of memory", "insufficient memory"):
            losses, self._gradients = self._passes.train(self._trained, self._gradients, batch, tokens=tokens)
        return losses

    def clip_gradients(self, max_norm: float) -> float:
        """Scale the gradients down to ``max_norm`` (0: leave them); returns the norm before."""
        assert self._gradients is not None  # noqa: S101 - a step begins with a micro-step
        squares = mx.stack([mx.square(gradient).sum() for gradient in self._gradients.values()])
        norm = math.sqrt(float(mx.sum(squares)))
        # As torch does it: the same factor, to the last digit that float32 has.
        factor = max_norm / (norm + 1e-6)
        if max_norm and factor < 1:
            self._gradients = {name: gradient * factor for name, gradient in self._gradients.items()}
        return norm

    def update(self, *, learning_rate: float) -> None:
        """Make AdamW's step."""
        assert self._gradients is not None  # noqa: S101 - a step begins with a micro-step
        self._trained = self._optimizer.update(self._trained, self._gradients, learning_rate=learning_rate)
        self._gradients = None

    def is_finite(self) -> bool:
        """Whether everything that is trained, and its moments, is finite."""
        arrays = [*self._trained.values(), *self._optimizer.m.values(), *self._optimizer.v.values()]
        return bool(mx.stack([mx.isfinite(array).all() for array in arrays]).all())

    def evaluate(self, batch: MicroBatch) -> Losses:
        """Forward only, without dropout."""
        with translate_out_of_memory("alloc", "out of memory", "insufficient memory"):
            return self._passes.evaluate(self._trained, batch)

    def state(self) -> EngineState:
        """The trained weights and AdamW's moments by mlx-lm's names, the steps made, and the generator's."""
        optimizer = self._optimizer
        return EngineState(
            model=dict(self._trained),
            optimizer={"step": optimizer.step, "m": dict(optimizer.m), "v": dict(optimizer.v)},
            rng=randomness.state(),
        )

    def load_state(self, state: EngineState) -> None:
        """Take a state back, or one of the engine of torch.

        Raises:
            ResumeRefused: if names, shapes or dtypes differ.
        """
        state = state_conversion.to_mlx(state)
        differences = adapter.differences(state.model, self._trained)
        for moment in ("m", "v"):
            found = adapter.differences(state.optimizer[moment], self._trained)
            differences += [f"moment {moment} of {line}" for line in found]
        if differences:
            raise state_conversion.state_mismatch(
                "the checkpoint does not fit the model", differences, state.model
            )
        self._trained = _copies(state.model, self._trained)
        self._optimizer.step = state.optimizer["step"]
        self._optimizer.m = _copies(state.optimizer["m"], self._trained)
        self._optimizer.v = _copies(state.optimizer["v"], self._trained)
        randomness.load_state(state.rng)

    def device_memory(self) -> MemoryUse | None:
        """What is allocated on the device, mlx's cache included; None where that is the host's memory."""
        return device_memory.allocated(self._device)

    def close(self) -> None:
        """Let go of model, optimizer and caches."""
        del self._model, self._passes, self._trained, self._optimizer, self._tokenizer, self._gradients
        device_memory.release()

    def _adapt(self, config: TrainConfig) -> None:
        if not config.lora_rank:
            self._model.unfreeze()
            return
        randomness.reseed(seed=config.seed, step=0, micro_step=0)
        adapter.add_adapter(
            self._model,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            target_modules=config.target_modules,
            rslora=config.rslora,
            dora=config.dora,
        )

    def _warn_of_window(self, config: TrainConfig) -> None:
        window = model.sliding_window(self._config)
        longest = config.max_length or DEFAULT_MAX_LENGTH
        if window is None or window >= longest or window in self._passes.windows:
            return
        warnings.warn(
            f"--model {config.model}: its layers see {window} tokens back, and mlx-lm does not limit them to "
            "that: longer examples are trained as if they saw all; lower --max-length or use --engine torch",
            DistrustWarning,
            stacklevel=2,
        )

    def _compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        compiled: Callable[..., Any] = mx.compile(function) if self._compiled else function
        return compiled

    def _device_name(self) -> str:
        if self._device.type == mx.DeviceType.cpu:
            return "cpu"
        return str(mx.device_info().get("device_name", "gpu"))


def _copies(arrays: Any, names: Any) -> dict[str, mx.array]:
    """In the order of the names, each contiguous and evaluated."""
    copied = {name: mx.contiguous(arrays[name].astype(mx.float32)) for name in names}
    mx.eval(copied)
    return copied
