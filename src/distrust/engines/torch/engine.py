"""TorchEngine: the contract of :mod:`distrust.contract` on torch, transformers and peft.

Trained parameters and their moments are float32. bfloat16 is for the frozen base and, through autocast, for
compute. With rank 0 all weights are trained, in float32.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch

from distrust.checkpoint.memory import keep_freed_memory
from distrust.config import TrainConfig
from distrust.contract import EngineState, Losses, MemoryUse
from distrust.data import MicroBatch
from distrust.engines.loading import (
    config_digest,
    context_length,
    fingerprint,
    load_tokenizer,
    require_vocabulary,
    stop_ids,
)
from distrust.engines.runtime import translate_out_of_memory
from distrust.engines.target_modules import Selection
from distrust.engines.torch import adapter, model, optimizer, quantization, runtime
from distrust.engines.torch.layers import fuse
from distrust.engines.torch.model_runner import ModelRunner
from distrust.errors import ConfigError, ModelError

_OUT_OF_MEMORY = "can't allocate memory"  # in the RuntimeError of the CPU allocator


class TorchEngine:
    """A causal language model of transformers with a LoRA adapter of peft, and AdamW.

    Takes and raises what :func:`distrust.engines.create_engine` does.
    """

    framework: Literal["torch"] = "torch"
    runner_class: type[ModelRunner] = ModelRunner  # a subclass of the engine may replace it

    def __init__(self, config: TrainConfig, objects: tuple[Any, Any] | None = None) -> None:
        self._device = runtime.choose_device(config.device)
        runtime.prefer_determinism()
        keep_freed_memory()
        torch.set_num_threads(config.threads or runtime.default_threads())
        compute_dtype: torch.dtype = getattr(torch, config.dtype)
        dtype = compute_dtype if config.lora_rank else torch.float32
        if objects is None:
            base: Any = model.load_model(
                config.model, dtype=dtype, device=self._device, quantized=config.quantization
            )
        else:
            base = model.copy_model(*objects, config, dtype=dtype, device=self._device)
        tokenizer = copy.deepcopy(objects[1]) if objects else None
        self.tokenizer: Any = load_tokenizer(
            config.model, chat_template=config.chat_template, given=tokenizer
        )
        rows = base.get_input_embeddings().weight.shape[0]
        require_vocabulary(self.tokenizer, rows, name=config.model)
        self._fingerprint = _fingerprint(base, config, compute_dtype)
        self._quantization = config.quantization
        self._config_digest = config_digest(base.config.to_diff_dict())
        self.context_length = context_length(base.config)
        self._attention = str(getattr(base.config, "_attn_implementation", "unknown"))
        self._gradient_checkpointing = config.gradient_checkpointing
        if config.gradient_checkpointing:
            # Its name in later versions of transformers, and in earlier ones.
            enable = getattr(base, "activation_checkpointing_enable", None)
            (enable or base.gradient_checkpointing_enable)({"use_reentrant": False})
        self._selection = Selection()
        self.model: torch.nn.Module = self._add_adapter(base, config).eval()
        self.adapted = self._selection.lines
        # A compiler fuses by itself, and better if it sees whole layers.
        self._fused = {} if config.compile else fuse(self.model, dtype=dtype)
        self._runner = self.runner_class(base, compute_dtype=compute_dtype, compiled=config.compile)
        with translate_out_of_memory(_OUT_OF_MEMORY):
            self._runner.require_causal(config.model)
        if config.packing and not self._runner.uses_varlen:
            raise ConfigError(
                "--packing: this model cannot keep the examples of one row independent (its attention is "
                f"{self._attention}, or its layers look across examples); leave it out"
            )
        self._compiled = runtime.compile_layers(base) if config.compile else 0
        self._trained = adapter.trained_parameters(self.model)
        self._optimizer = optimizer.make_optimizer(self._trained, config)

    @property
    def parameters(self) -> tuple[int, int]:
        """Number of trained weights, and of all weights."""
        trained = sum(parameter.numel() for parameter in self._trained.values())
        return trained, sum(quantization.count(parameter) for parameter in self.model.parameters())

    def fingerprint(self) -> str:
        """BLAKE3 of the base model's weights as loaded, before any quantization."""
        return self._fingerprint

    def environment(self) -> dict[str, Any]:
        """Everything that may change the last bits of a run."""
        import peft
        import transformers

        name = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else self._device.type
        return {
            "engine": "torch",
            "torch": torch.__version__,
            "peft": peft.__version__,
            "transformers": transformers.__version__,
            "device": name,
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "matmul_precision": torch.get_float32_matmul_precision(),
            "model_config": self._config_digest,
            "threads": torch.get_num_threads(),
            "attention": f"{self._attention}, {'packed' if self._runner.uses_varlen else 'padded'}",
            "loss": "in chunks" if self._runner.uses_chunked_loss else "of all logits",
            "fused": self._fused,
            "optimizer": f"fused {type(self._optimizer).__name__}",
            "gradient_checkpointing": self._gradient_checkpointing,
            "compiled": bool(self._compiled),
            **quantization.environment(self._quantization),
            **self._selection.recorded,
        }

    def restore_environment(self, recorded: dict[str, Any]) -> None:
        """Apply what can be chosen of a recorded environment: the number of threads."""
        threads = recorded.get("threads")
        if isinstance(threads, int) and threads >= 1:
            torch.set_num_threads(threads)

    def begin_micro_step(self, *, seed: int, step: int, micro_step: int) -> None:
        """Seed every random generator; the first micro-step clears the gradients."""
        if micro_step == 0:
            self._optimizer.zero_grad(set_to_none=True)
        runtime.reseed(seed=seed, step=step, micro_step=micro_step)

    def micro_step(self, batch: MicroBatch, *, tokens: int) -> Losses:
        """Forward and backward: add the gradient of Σ weight · cross-entropy / ``tokens``."""
        self.model.train()
        with translate_out_of_memory(_OUT_OF_MEMORY), runtime.compiler_errors():
            return self._runner.train(batch, tokens=tokens)

    def clip_gradients(self, max_norm: float) -> float:
        """Scale the gradients down to ``max_norm`` (0: leave them); returns the norm before clipping."""
        return float(torch.nn.utils.clip_grad_norm_(self._trained.values(), max_norm or float("inf")))

    def update(self, *, learning_rate: float) -> None:
        """Take one step of AdamW."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Whether all trained weights and moments are finite."""
        moments = [value for state in self._optimizer.state.values() for value in state.values()]
        tensors = [*self._trained.values(), *moments]
        # A sum is finite only if every term is: one pass, and one synchronization.
        sums = torch.stack([tensor.sum().to(self._device) for tensor in tensors])
        if bool(torch.isfinite(sums).all()):
            return True
        # Or a sum of finite terms overflowed: look at each element.
        return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)

    def evaluate(self, batch: MicroBatch) -> Losses:
        """Forward only, without dropout."""
        self.model.eval()
        with translate_out_of_memory(_OUT_OF_MEMORY), runtime.compiler_errors():
            return self._runner.evaluate(batch)

    @torch.no_grad()
    def sample_tokens(
        self, ids: list[int], *, limit: int, temperature: float, top_p: float | None, seed: int, chat: bool
    ) -> list[int]:
        """Token ids that continue ``ids``; see :func:`distrust.engines.generate`."""
        prompt = torch.tensor([ids], device=self._device)  # [1, n]
        sampling: dict[str, Any] = {"do_sample": bool(temperature)}
        if temperature:
            sampling["temperature"] = temperature
        if temperature and top_p is not None:
            sampling["top_p"] = top_p
        runtime.reseed(seed=seed, step=0, micro_step=0)
        model: Any = self.model.eval()
        ends = stop_ids(self.tokenizer, model.generation_config.eos_token_id, chat=chat)
        try:
            output = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=limit,
                eos_token_id=ends or None,
                pad_token_id=ends[0] if ends else None,
                use_cache=True,
                # The model's own settings may ask for what is no single text.
                num_beams=1,
                num_return_sequences=1,
                return_dict_in_generate=False,
                tokenizer=self.tokenizer,  # that its stop_strings are written in
                **sampling,
            )
        except Exception as error:  # a model's code may raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise ModelError(f"the model cannot generate, with its generation config: {reason}") from error
        new_ids: list[int] = output[0, len(ids) :].tolist()
        return new_ids[:-1] if new_ids[-1] in ends else new_ids

    def state(self) -> EngineState:
        """Trained weights by peft's names, AdamW's state, and the state of the random generators."""
        return EngineState(
            model={name: parameter.detach() for name, parameter in self._trained.items()},
            optimizer=self._optimizer.state_dict(),
            rng=runtime.rng_state(self._device),
        )

    def load_state(self, state: EngineState) -> None:
        """Copy a state of either engine into the parameters; ResumeRefused changes nothing."""
        optimizer.restore(state, self._trained, self._optimizer)
        runtime.load_rng_state(state.rng, self._device)

    def device_memory(self) -> MemoryUse | None:
        """Bytes allocated on the device; None where that is the host's memory."""
        return runtime.memory_use(self._device)

    def close(self) -> None:
        """Release model, optimizer and caches."""
        del self.model, self._runner, self._trained, self._optimizer, self.tokenizer
        runtime.release_memory(self._device)

    def _add_adapter(self, base: Any, config: TrainConfig) -> torch.nn.Module:
        if not config.lora_rank:
            return base  # type: ignore[no-any-return]
        runtime.reseed(seed=config.seed, step=0, micro_step=0)
        if config.gradient_checkpointing:
            # A checkpointed block has gradients only if its input requires them; frozen embeddings do not.
            base.enable_input_require_grads()
        adapted, self._selection = adapter.add_adapter(base, config)
        # Quantized weights are on the device already, and peft has put their adapters there.
        return adapted if config.quantization != "none" else adapted.to(self._device)


def _fingerprint(base: torch.nn.Module, config: TrainConfig, dtype: torch.dtype) -> str:
    """Digest of the weights before quantization; the files have them where the model no longer does."""
    if config.quantization == "none":
        weights: Any = sorted(base.named_parameters())
    else:
        weights = model.stored_weights(config.model, dtype=dtype)
    return fingerprint(model.named_weights(weights, model=config.model))
