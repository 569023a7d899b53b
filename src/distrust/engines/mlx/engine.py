"""MlxEngine: the contract of :mod:`distrust.contract` on mlx and mlx-lm.

As in the engine of torch, trained arrays and their moments are float32; bfloat16 is for the frozen base and
for compute. With rank 0 all weights are trained, in float32. The engine holds the trained arrays by
name and passes them to every forward pass; the model only receives them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Literal

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_sampler
from mlx_lm.utils import get_total_parameters

from distrust.checkpoint.memory import return_freed_memory
from distrust.config import TrainConfig
from distrust.contract import DEFAULT_MAX_LENGTH, DeviceMemory, EngineState, Losses, accumulate_alone
from distrust.data import MicroBatch
from distrust.engines import state_conversion
from distrust.engines.loading import (
    config_digest,
    context_length,
    fingerprint,
    load_tokenizer,
    require_vocabulary,
    stop_ids,
)
from distrust.engines.micro_batches import gather_losses, owner, require_same_step, require_work
from distrust.engines.mlx import adapter, exchange, layers, model, runtime
from distrust.engines.mlx.model_runner import ModelRunner
from distrust.engines.mlx.optimizer import AdamW
from distrust.engines.out_of_memory import out_of_memory
from distrust.engines.target_modules import Selection, layer_of
from distrust.errors import warn
from distrust.option_values import Precision
from distrust.ranks import SINGLE, Ranks


class MlxEngine:
    """A language model of mlx-lm with its LoRA layers, and AdamW.

    mlx's arrays belong to the thread that created them: use an engine in one thread. Raises what
    :func:`distrust.engines.create_engine` raises.
    """

    framework: Literal["mlx"] = "mlx"
    peers = None
    release_memory = staticmethod(runtime.release_memory)

    @out_of_memory("load")
    def __init__(self, config: TrainConfig, ranks: Ranks = SINGLE) -> None:
        require_work(config, ranks)
        self._ranks, self.world_size, self._is_exact = ranks, ranks.count, config.reduction == "exact"
        self._device = runtime.choose_device(config.device)
        on_cpu = self._device.type == mx.DeviceType.cpu
        automatic: Precision = "float32" if on_cpu else "bfloat16"
        self.dtype = automatic if config.dtype == "auto" else config.dtype
        mx.set_default_device(self._device)
        return_freed_memory()
        self.tokenizer: Any = load_tokenizer(config.model, chat_template=config.chat_template)
        base_dtype = self.dtype if config.lora_rank else "float32"
        self._model, self._config = model.load_model(config.model, dtype=base_dtype)
        rows = model.text_entry(self._config, "vocab_size") or len(self.tokenizer)
        require_vocabulary(self.tokenizer, rows, name=config.model)
        # Before quantization.
        self._fingerprint = fingerprint(model.named_weights(self._model, name=config.model))
        model.quantize(self._model, config.quantization)
        self.context_length: int | None = context_length(self._config)
        self._gradient_checkpointing = config.gradient_checkpointing
        # Products by columns do not pay with Apple's own library, nor on a GPU.
        self._by_columns = on_cpu and sys.platform != "darwin" and config.lora_rank > 0
        if self._by_columns:
            layers.use_columns(self._model)
        self._compiled = runtime.should_compile(config, self._device)
        base_parameters = get_total_parameters(self._model)  # counts packed weights, too
        self._selection = Selection()
        if config.lora_rank:
            runtime.reseed(seed=config.seed, step=0, micro_step=0)
            self._selection = adapter.add_adapter(self._model, config)
        else:
            self._model.unfreeze()
        if config.gradient_checkpointing:
            layers.checkpoint_layers(self._model)
        self._trained = adapter.trained_parameters(self._model)
        mx.eval(self._trained)  # mlx is lazy: compute the initial values now
        trained = sum(array.size for array in self._trained.values())
        self.adapted = self._selection.lines
        self.parameters = trained, base_parameters + (trained if config.lora_rank else 0)
        self._runner = self._create_runner(config)
        self._runner.require_causal(config.model)
        self._warn_of_unlimited_window(config)
        self._optimizer = AdamW(self._trained, config, compiled=self._compiled)
        self._gradients: dict[str, mx.array] | None = None  # sums over the micro-batches of the step

    @property
    def model(self) -> Any:
        """The model with its adapter, with the current trained arrays."""
        self._runner.set_parameters(self._trained)
        return self._model

    def fingerprint(self) -> str:
        """BLAKE3 of the base model's weights as loaded, before any quantization."""
        return self._fingerprint

    def environment(self) -> dict[str, Any]:
        """Everything that may change the last bits of a run."""
        on_cpu = self._device.type == mx.DeviceType.cpu
        return {
            "engine": "mlx",
            "mlx": version("mlx"),
            "mlx_lm": version("mlx-lm"),
            "device": "cpu" if on_cpu else str(mx.device_info().get("device_name", "gpu")),
            "model_config_mlx": config_digest(self._config),
            "attention": "rows shared" if self._runner.uses_varlen else "a row each",
            "loss": "in chunks" if self._runner.uses_chunked_loss else "of all logits",
            "products": "by columns" if self._by_columns else "by rows",
            "gradient_checkpointing": self._gradient_checkpointing,
            "compiled": self._compiled,
            **self._selection.recorded,
        }

    def restore_environment(self, recorded: dict[str, Any]) -> None:
        """Nothing to apply: mlx has no number of threads."""

    @property
    def prepare(self) -> Callable[[MicroBatch], MicroBatch]:
        """Place a batch into the rows that the passes take."""
        return out_of_memory("step")(self._runner.prepare)

    @out_of_memory("step")
    def accumulate(
        self, batches: Sequence[MicroBatch], *, seed: int, step: int, tokens: int
    ) -> Sequence[Losses]:
        """Forward and backward of all micro-batches; gradients are summed in their order."""
        ranks, count = self._ranks, len(batches)
        if ranks.count == 1:
            return accumulate_alone(self, batches, seed=seed, step=step, tokens=tokens)
        require_same_step(ranks, batches, step=step, tokens=tokens)
        losses: dict[int, Losses] = {}
        gradients: dict[str, mx.array] = {}
        total: exchange.Flat | None = None
        for begin in range(0, count, ranks.count):
            numbers = range(begin, min(begin + ranks.count, count))
            owners = [owner(number, count=count, ranks=ranks.count) for number in numbers]
            if ranks.index in owners:
                number = numbers[owners.index(ranks.index)]
                runtime.reseed(seed=seed, step=step, micro_step=number)
                earlier, batch = None if self._is_exact else gradients or None, batches[number]
                losses[number], gradients = self._runner.train(self._trained, earlier, batch, tokens=tokens)
            if self._is_exact or numbers.stop == count:
                adding = owners if self._is_exact else range(ranks.count)
                total = exchange.add_round(ranks, exchange.flatten(gradients), total, owners=adding)
        assert total is not None  # noqa: S101 - a step has a micro-batch
        self._gradients = exchange.unflatten(total, gradients)
        return gather_losses(ranks, batches, losses)

    def begin_micro_step(self, *, seed: int, step: int, micro_step: int) -> None:
        """Seed the random generator; the first micro-step clears the gradients."""
        if micro_step == 0:
            self._gradients = None
        runtime.reseed(seed=seed, step=step, micro_step=micro_step)

    @out_of_memory("step")
    def micro_step(self, batch: MicroBatch, *, tokens: int) -> Losses:
        """Forward and backward: add the gradient of Σ weight · cross-entropy / ``tokens``."""
        losses, self._gradients = self._runner.train(self._trained, self._gradients, batch, tokens=tokens)
        return losses

    @out_of_memory("step")
    def clip_gradients(self, max_norm: float) -> float:
        """Scale the gradients down to ``max_norm`` (0: leave them); returns the norm before clipping."""
        assert self._gradients is not None  # noqa: S101 - a step begins with a micro-step
        squares = mx.stack([mx.square(gradient).sum() for gradient in self._gradients.values()])
        norm = math.sqrt(float(mx.sum(squares)))
        factor = max_norm / (norm + 1e-6)  # as in torch.nn.utils.clip_grad_norm_
        if max_norm and factor < 1:
            self._gradients = {name: gradient * factor for name, gradient in self._gradients.items()}
        return norm

    @out_of_memory("update")
    def update(self, *, learning_rate: float) -> None:
        """Take one step of AdamW."""
        assert self._gradients is not None  # noqa: S101 - a step begins with a micro-step
        self._trained = self._optimizer.update(self._trained, self._gradients, learning_rate=learning_rate)
        self._gradients = None

    def is_finite(self) -> bool:
        """Whether all trained weights and moments are finite."""
        arrays = [*self._trained.values(), *self._optimizer.m.values(), *self._optimizer.v.values()]
        return bool(mx.stack([mx.isfinite(array).all() for array in arrays]).all())

    def checksum(self) -> int:
        """The sum of all trained arrays and moments, read as integers."""
        arrays = [*self._trained.values(), *self._optimizer.m.values(), *self._optimizer.v.values()]
        return sum(int(mx.sum(array.view(mx.int32).astype(mx.int64))) for array in arrays)

    def frozen_checksums(self) -> dict[str, int]:
        """The sum of the bytes of each frozen array, by mlx-lm's names."""
        arrays = dict(tree_flatten(self._model.parameters()))
        frozen = {name: array.flatten() for name, array in arrays.items() if name not in self._trained}
        return {name: int(mx.sum(array.view(mx.uint8))) for name, array in frozen.items()}

    @out_of_memory("evaluate")
    def evaluate(self, batch: MicroBatch) -> Losses:
        """Forward only, without dropout."""
        return self._runner.evaluate(self._trained, batch)

    @out_of_memory("generate")
    def sample_tokens(
        self, ids: list[int], *, limit: int, temperature: float, top_p: float | None, seed: int, chat: bool
    ) -> list[int]:
        """Token ids that continue ``ids``; see :func:`distrust.engines.generate`."""
        runtime.reseed(seed=seed, step=0, micro_step=0)
        model = self.model  # with the current weights
        model.eval()
        sampler = make_sampler(temp=temperature, top_p=top_p or 0.0)  # 0.0: all tokens
        # mlx-lm has replaced the config's entry by that of generation_config.json.
        ends = stop_ids(self.tokenizer, self._config.get("eos_token_id"), chat=chat)
        new_ids: list[int] = []
        for token, _ in generate_step(mx.array(ids), model, max_tokens=limit, sampler=sampler):
            if token in ends:
                break
            new_ids.append(token)
        return new_ids

    def state(self) -> EngineState:
        """Trained arrays and AdamW's moments by mlx-lm's names, the step, and the generator's state."""
        optimizer = self._optimizer
        return EngineState(
            model=dict(self._trained),
            optimizer={"step": optimizer.step, "m": dict(optimizer.m), "v": dict(optimizer.v)},
            rng=runtime.rng_state(),
        )

    @out_of_memory("load")
    def load_state(self, state: EngineState) -> None:
        """Load a state of either engine; ResumeRefused changes nothing."""
        state = state_conversion.to_mlx(state)
        differences = state_conversion.list_differences(state.model, self._trained)
        for key in ("m", "v"):
            lines = state_conversion.list_differences(state.optimizer[key], self._trained)
            differences += [f"moment {key} of {line}" for line in lines]
        state_conversion.require_no_differences(differences, state.model)
        names = list(self._trained)
        self._trained = _load_arrays(state.model, names)
        self._optimizer.step = state.optimizer["step"]
        self._optimizer.m = _load_arrays(state.optimizer["m"], names)
        self._optimizer.v = _load_arrays(state.optimizer["v"], names)
        runtime.load_rng_state(state.rng)

    def device_for(self, nbytes: int) -> None:
        """None: arrays of mlx are loaded to the host, whose memory they share."""

    def device_memory(self) -> DeviceMemory | None:
        """Memory used on the device; None on a CPU."""
        return runtime.device_memory(self._device)

    def close(self) -> None:
        """Release model, optimizer and caches."""
        del self._model, self._runner, self._trained, self._optimizer, self.tokenizer, self._gradients
        self.release_memory()

    def _create_runner(self, config: TrainConfig) -> ModelRunner:
        casts = not config.lora_rank and self.dtype != "float32"  # float32 weights, other products
        return ModelRunner(
            self._model,
            compute_dtype=getattr(mx, self.dtype) if casts else None,
            frozen_head=all(layer_of(name) is not None for name in self._trained),
            by_columns=self._by_columns,
            compiled=self._compiled,
        )

    def _warn_of_unlimited_window(self, config: TrainConfig) -> None:
        window = model.text_entry(self._config, "sliding_window")  # tokens that a token sees
        if type(window) is not int or model.text_entry(self._config, "use_sliding_window") is False:
            return
        if window >= (config.max_length or DEFAULT_MAX_LENGTH) or window in self._runner.windows:
            return
        warn(
            f"--model {config.model}: its layers are limited to {window} tokens back, and mlx-lm does not "
            "apply that limit: longer examples are trained without it; lower --max-length or use "
            "--engine torch"
        )


def _load_arrays(arrays: Mapping[str, Any], names: Iterable[str]) -> dict[str, mx.array]:
    """float32 arrays in the order of the names, contiguous and evaluated."""
    # Contiguous, because a state of the engine of torch comes as transposed views.
    loaded = {name: mx.contiguous(arrays[name].astype(mx.float32)) for name in names}
    mx.eval(loaded)
    return loaded
