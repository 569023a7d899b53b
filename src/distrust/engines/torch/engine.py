"""TorchEngine: the contract of ``training/engine.py`` on torch.

What is trained is float32, and so are its moments; bfloat16 is for the frozen base and, through autocast,
for the arithmetic. With rank 0 all weights are trained, in float32.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any, Literal

import torch

from distrust.checkpoint.memory import keep_freed_memory
from distrust.config import TrainConfig
from distrust.contract import EngineState, Losses, MemoryUse
from distrust.data import MicroBatch, Tokenizer
from distrust.engines import state_conversion, tokenizer
from distrust.engines.fingerprint import fingerprint
from distrust.engines.out_of_memory import translate_out_of_memory
from distrust.engines.torch import adapter, device_memory, model, optimizer, quantization, randomness
from distrust.engines.torch.compiling import compile_layers, compiler_errors
from distrust.engines.torch.fused import fuse
from distrust.engines.torch.model_runner import ModelRunner
from distrust.errors import ConfigError


class TorchEngine:
    """A causal language model of transformers with a LoRA adapter of peft, and AdamW.

    Args:
        config: what to load and how to train it.

    Raises:
        ModelError: if the model or tokenizer cannot be loaded.
        ConfigError: if an option does not fit the model or the machine.
    """

    #: What runs the model; a subclass may bring its own.
    runner: type[ModelRunner] = ModelRunner

    def __init__(self, config: TrainConfig) -> None:
        self._device = model.choose_device(config.device)
        _prefer_determinism()
        keep_freed_memory()
        torch.set_num_threads(config.threads or _machine_threads())
        self._arithmetic = model.torch_dtype(config.dtype)
        self._tokenizer = tokenizer.load_tokenizer(config.model)
        dtype = self._arithmetic if config.lora_rank else torch.float32
        base = model.load_model(
            config.model,
            dtype=dtype,
            device=self._device,
            quantized=config.quantization,
        )
        rows = base.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        tokenizer.require_room_for(self._tokenizer, rows, name=config.model)
        weights = (
            sorted(base.named_parameters())
            if config.quantization == "none"
            else model.stored_weights(config.model, dtype=self._arithmetic)
        )
        self._fingerprint = fingerprint(model.named_weights(weights))
        self._quantization = config.quantization
        self._config_digest = model.config_digest(base)
        self._context_length: int | None = getattr(base.config, "max_position_embeddings", None)
        self._gradient_checkpointing = config.gradient_checkpointing
        self._attention = str(getattr(base.config, "_attn_implementation", "unknown"))
        if config.gradient_checkpointing:
            # Later versions of transformers call it by the first name, earlier ones by the second.
            enable: Any = getattr(base, "activation_checkpointing_enable", None)
            enable = enable or base.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self._model = self._adapted(base, config).eval()
        # A compiler fuses by itself, and better if it sees the whole of a layer.
        self._fused = {} if config.compile else fuse(self._model, dtype=dtype)
        self._passes = self.runner(base, arithmetic=self._arithmetic, compiled=config.compile)
        if config.packing and not self._passes.packs:
            raise ConfigError(
                "--packing: this model cannot keep apart what stands in one row (its attention is "
                f"{self._attention}, or its layers look across examples); leave it out"
            )
        self._compiled = compile_layers(base) if config.compile else 0
        self._trained = adapter.trained_parameters(self._model)
        self._optimizer = optimizer.make_optimizer(self._trained, config)

    @property
    def framework(self) -> Literal["torch"]:
        """Of the arrays that :meth:`load_state` takes."""
        return "torch"

    @property
    def tokenizer(self) -> Tokenizer:
        """The base model's."""
        tokenizer: Tokenizer = self._tokenizer
        return tokenizer

    @property
    def model(self) -> torch.nn.Module:
        """The model with its adapter."""
        return self._model

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._device

    @property
    def context_length(self) -> int | None:
        """Tokens that the model can see at once, if its config says."""
        return self._context_length

    @property
    def parameters(self) -> tuple[int, int]:
        """How many numbers are trained, and how many there are."""
        trained = sum(parameter.numel() for parameter in self._trained.values())
        return trained, sum(quantization.count(parameter) for parameter in self._model.parameters())

    def fingerprint(self) -> str:
        """BLAKE3 of the base model's weights as they were loaded, before any quantization."""
        return self._fingerprint

    def environment(self) -> dict[str, Any]:
        """What may change the last bits."""
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
            "attention": f"{self._attention}, {'packed' if self._passes.packs else 'padded'}",
            "loss": "in chunks" if self._passes.chunks else "of all logits",
            "fused": self._fused,
            "optimizer": f"fused {type(self._optimizer).__name__}",
            "gradient_checkpointing": self._gradient_checkpointing,
            "compiled": bool(self._compiled),
            **quantization.environment(self._quantization),
        }

    def restore_environment(self, recorded: dict[str, Any]) -> None:
        """Take back what of a recorded environment can be chosen: the number of threads."""
        threads = recorded.get("threads")
        if isinstance(threads, int) and threads >= 1:
            torch.set_num_threads(threads)

    def begin_micro_step(self, *, seed: int, step: int, micro_step: int) -> None:
        """Seed every generator of random numbers; the first micro-step begins without gradients."""
        if micro_step == 0:
            self._optimizer.zero_grad(set_to_none=True)
        randomness.reseed(seed=seed, step=step, micro_step=micro_step)

    def micro_step(self, batch: MicroBatch, *, tokens: int) -> Losses:
        """Forward and backward: add the gradient of Σ weight · cross-entropy / ``tokens``."""
        self._model.train()
        with translate_out_of_memory("can't allocate memory"), compiler_errors():
            return self._passes.train(batch, tokens=tokens)

    def clip_gradients(self, max_norm: float) -> float:
        """Scale the gradients down to ``max_norm`` (0: leave them); returns the norm before."""
        norm = torch.nn.utils.clip_grad_norm_(self._trained.values(), max_norm or float("inf"))
        return float(norm)

    def update(self, *, learning_rate: float) -> None:
        """Make AdamW's step."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Whether everything that is trained, and its moments, is finite."""
        moments = [value for state in self._optimizer.state.values() for value in state.values()]
        tensors = [*self._trained.values(), *moments]
        # A sum is finite only if each of its terms is: one pass, and one question to the device for all.
        sums = [tensor.sum() for tensor in tensors]
        if all(bool(torch.isfinite(torch.stack(group)).all()) for group in _by_device(sums)):
            return True
        # Or finite terms were too large together.
        return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)

    def evaluate(self, batch: MicroBatch) -> Losses:
        """Forward only, without dropout."""
        self._model.eval()
        with translate_out_of_memory("can't allocate memory"), compiler_errors():
            return self._passes.evaluate(batch)

    def state(self) -> EngineState:
        """The trained weights, AdamW's state by the parameters' names, and the generators'."""
        return EngineState(
            model={name: parameter.detach() for name, parameter in self._trained.items()},
            optimizer=self._optimizer.state_dict(),
            rng=randomness.state(self._device),
        )

    def load_state(self, state: EngineState) -> None:
        """Take a state back, or one of the engine of mlx, into the existing parameters.

        Raises:
            ResumeRefused: if names, shapes or dtypes differ.
        """
        state = state_conversion.to_torch(state, self._optimizer.state_dict()["param_groups"])
        differences = adapter.differences(state.model, self._trained)
        differences += optimizer.differences(state.optimizer, self._optimizer)
        if differences:
            raise state_conversion.state_mismatch(
                "the checkpoint does not fit the model", differences, state.model
            )
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(state.model[name])
        optimizer.load(state.optimizer, self._optimizer)
        randomness.load_state(state.rng, self._device)

    def device_memory(self) -> MemoryUse | None:
        """What is allocated on the device; None where that is the host's memory."""
        return device_memory.allocated(self._device)

    def close(self) -> None:
        """Let go of model, optimizer and caches."""
        del self._model, self._passes, self._trained, self._optimizer, self._tokenizer
        device_memory.release(self._device)

    def _adapted(self, base: torch.nn.Module, config: TrainConfig) -> torch.nn.Module:
        if not config.lora_rank:
            return base
        randomness.reseed(seed=config.seed, step=0, micro_step=0)
        if config.gradient_checkpointing:
            # A checkpointed block passes gradients on only if its input wants them; frozen embeddings don't.
            base.enable_input_require_grads()  # type: ignore[operator]
        adapted = adapter.add_adapter(
            base,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            target_modules=config.target_modules,
            rslora=config.rslora,
            dora=config.dora,
        )
        # Quantized weights lie there already, and their adapters with them.
        return adapted if config.quantization != "none" else adapted.to(self._device)


def _by_device(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    devices = {tensor.device for tensor in tensors}
    return [[tensor for tensor in tensors if tensor.device == device] for device in devices]


@cache
def _machine_threads() -> int:
    """As many as the first engine found: the run before this one may have chosen others for the process."""
    return torch.get_num_threads()


def _prefer_determinism() -> None:
    # Read by cuBLAS when it starts; without it its matrix products may differ from run to run.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
