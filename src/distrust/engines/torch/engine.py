"""TorchEngine: the contract of :mod:`distrust.contract` on torch, transformers and peft.

Trained parameters and their moments are float32. bfloat16 is for the frozen base and, through autocast, for
compute. With rank 0 all weights are trained, in float32.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from typing import Any, Literal

import torch

from distrust.checkpoint.memory import keep_freed_memory, return_freed_memory
from distrust.checkpoint.shared_writer import Peers
from distrust.config import TrainConfig
from distrust.contract import DeviceMemory, EngineState, Losses, accumulate_alone
from distrust.data import MicroBatch
from distrust.engines.loading import (
    config_digest,
    context_length,
    load_tokenizer,
    require_vocabulary,
    stop_ids,
)
from distrust.engines.micro_batches import gather_losses, require_same_step, require_work
from distrust.engines.out_of_memory import out_of_memory, raise_if_out_of_memory
from distrust.engines.runtime import trial_batch
from distrust.engines.target_modules import Selection
from distrust.engines.torch import adapter, fingerprint, model, optimizer, quantization, runtime
from distrust.engines.torch.exchange import Exchange
from distrust.engines.torch.layers import fuse
from distrust.engines.torch.model_runner import DeviceLosses, ModelRunner, fetch
from distrust.engines.torch.row import Row
from distrust.errors import ConfigError, ModelError
from distrust.ranks import SINGLE, Ranks, of_leader


class TorchEngine:
    """A causal language model of transformers with a LoRA adapter of peft, and AdamW.

    Takes and raises what :func:`distrust.engines.create_engine` does.
    """

    framework: Literal["torch"] = "torch"
    runner_class: type[ModelRunner] = ModelRunner  # a subclass of the engine may replace it
    peers: Peers | None = None

    @out_of_memory("load")
    def __init__(
        self, config: TrainConfig, objects: tuple[Any, Any] | None = None, ranks: Ranks = SINGLE
    ) -> None:
        require_work(config, ranks)
        self.world_size, self._ranks = ranks.count, ranks
        self._sums_fast = ranks.count > 1 and config.reduction == "fast"
        self._device = runtime.choose_device(
            config.device, local_index=ranks.local_index, local_count=ranks.local_count
        )
        self._sharding: Any = None  # the module that divides the base among the ranks
        if config.shard == "base":  # not every build of torch can import it
            from distrust.engines.torch import sharded_base

            self._sharding = sharded_base
        self.dtype = runtime.choose_dtype(config.dtype, self._device)
        share = partial(runtime.share_of_threads, ranks.local_count)
        self._threads = config.threads or of_leader(ranks, share)  # equal on all ranks, for equal bits
        # glibc does not use the memory of a gathered layer again, and each layer would add to it.
        (return_freed_memory if self._sharding else keep_freed_memory)()
        # Trials compare in full precision, and leave it to `deterministic` to warn.
        with self._settings(), runtime.full_precision(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*determin")
            self._build(config, objects)

    def _build(self, config: TrainConfig, objects: tuple[Any, Any] | None) -> None:
        compute_dtype: torch.dtype = getattr(torch, self.dtype)
        dtype = compute_dtype if config.lora_rank else torch.float32
        if self._sharding:
            base: Any = self._sharding.load(config, self._ranks, objects, dtype=dtype, device=self._device)
        elif objects is None:
            base = model.load_model(
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
        self._name = config.model
        if self._sharding:
            digest: Callable[[], str] = self._sharding.digest(base, config, self._ranks)
        else:
            digest = fingerprint.start(base, config, dtype=compute_dtype, device=self._device)
        try:
            self._prepare(base, config, dtype=dtype, compute_dtype=compute_dtype)
        finally:  # weights that are not finite explain an error of the trials, too
            self._fingerprint = digest()

    def _prepare(
        self, base: Any, config: TrainConfig, *, dtype: torch.dtype, compute_dtype: torch.dtype
    ) -> None:
        """Add the adapter to the base, choose how to run it by trials, and create the optimizer."""
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
        on_cuda = self._device.type == "cuda"
        gather: Any = partial(self._sharding.gather_each, base=base) if self._sharding else iter
        runner_class = self._sharding.ShardedRunner if self._sharding else self.runner_class
        self._fused = {} if config.compile else fuse(self.model, dtype=dtype, cuda=on_cuda, gather=gather)
        ends = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        self._runner = runner_class(
            base,
            compute_dtype=compute_dtype,
            compiled=config.compile,
            pad_token_id=next((token for token in ends if token is not None), 0),
        )
        self._runner.require_causal(config.model)
        if config.packing and not self._runner.uses_varlen:
            raise ConfigError(
                "--packing: this model cannot keep the examples of one row independent (its attention is "
                f"{self._attention}, or its layers look across examples); leave it out"
            )
        self._compiled = runtime.compile_layers(base) if config.compile else 0
        self._modules = [*self.model.modules()]
        self._trained = adapter.trained_parameters(self.model)
        self._optimizer = optimizer.make_optimizer(self._trained, config)
        self._step_losses: list[DeviceLosses] = []  # of the passes whose gradients are summed here
        # The passes that have added to the gradients, and what seeds them.
        self._calls: list[Callable[[], object]] = []
        self._exchange: Exchange | None = None
        if self.world_size > 1:
            trained = [*self._trained.values()]
            self._exchange = Exchange(trained, self._ranks, config.reduction, clear=self._clear_gradients)

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

        return {
            "engine": "torch",
            "torch": torch.__version__,
            "peft": peft.__version__,
            "transformers": transformers.__version__,
            **runtime.describe(self._device, threads=self._threads),
            "deterministic": self.deterministic,
            "model_config": self._config_digest,
            "attention": f"{self._attention}, {self._runner.packing}",
            "loss": "in chunks" if self._runner.uses_chunked_loss else "of all logits",
            "fused": self._fused,
            "optimizer": f"fused {type(self._optimizer).__name__}",
            "gradient_checkpointing": self._gradient_checkpointing,
            "compiled": bool(self._compiled),
            **({"reduction": "fast", "ranks": self.world_size} if self._sums_fast else {}),
            **quantization.environment(self._quantization),
            **self._selection.recorded,
        }

    def restore_environment(self, recorded: dict[str, Any]) -> None:
        """Apply what can be chosen of a recorded environment: the number of threads."""
        threads = recorded.get("threads")
        if isinstance(threads, int) and threads >= 1:
            self._threads = threads
            runtime.warn_of_threads(threads, self._ranks.local_count)

    @cached_property
    def deterministic(self) -> bool:
        """Whether every operation of a training step has a deterministic kernel here.

        The first use makes a pass over a few tokens, which leaves no trace, and warns if one has none. Layers
        are not compiled in it: the shapes of the first step decide how they are.
        """
        trained, mode, rng = [*self._trained.values()], self.model.training, runtime.rng_state(self._device)
        gradients, batch = [weight.grad for weight in trained], trial_batch(self._runner.vocabulary)
        eager: Any = torch.compiler.set_stance("force_eager") if self._compiled else nullcontext()
        self._set_mode(training=True)
        with self._settings(warn_only=False), out_of_memory("step"), eager:
            train = partial(self._runner.train, batch, tokens=batch.tokens)
            deterministic = runtime.is_deterministic(train, model=self._name)
        self._set_mode(training=mode)
        for weight, gradient in zip(trained, gradients, strict=True):
            weight.grad = gradient
        runtime.load_rng_state(rng, self._device)
        return deterministic

    @property
    def prepare(self) -> Callable[[MicroBatch], MicroBatch]:
        """Build the row that the passes take; for CUDA in page-locked memory."""
        return out_of_memory("step")(partial(Row.of, page_locked=self._device.type == "cuda"))

    @out_of_memory("step")
    def accumulate(
        self, batches: Sequence[MicroBatch], *, seed: int, step: int, tokens: int
    ) -> Sequence[Losses]:
        """Forward and backward of all micro-batches; gradients are summed in their order."""
        if self._exchange is None:
            return accumulate_alone(self, batches, seed=seed, step=step, tokens=tokens)
        require_same_step(self._ranks, batches, step=step, tokens=tokens)
        losses: dict[int, DeviceLosses] = {}

        def compute(micro_step: int) -> None:
            self.begin_micro_step(seed=seed, step=step, micro_step=micro_step)
            losses[micro_step] = self.micro_step(batches[micro_step], tokens=tokens)

        self._exchange.accumulate(compute, len(batches))
        fetch([*losses.values()])
        return gather_losses(self._ranks, batches, losses)

    def begin_micro_step(self, *, seed: int, step: int, micro_step: int) -> None:
        """Seed every random generator; the first micro-step clears the gradients."""
        if micro_step == 0:
            self._clear_gradients()
        self._calls.append(partial(runtime.reseed, seed=seed, step=step, micro_step=micro_step))
        self._calls[-1]()

    @out_of_memory("step")
    def micro_step(self, batch: MicroBatch, *, tokens: int) -> DeviceLosses:
        """Forward and backward: add the gradient of Σ weight · cross-entropy / ``tokens``."""
        self._calls.append(partial(self._train, batch, tokens=tokens))
        if not runtime.is_deterministic(self._calls[-1], model=self._name):  # unlike the trial
            self.deterministic = False
            self._drop_gradients()  # some have the gradient already: make all again
            for call in self._calls:
                call()
        return self._step_losses[-1]

    @out_of_memory("step")
    def clip_gradients(self, max_norm: float) -> float:
        """Scale the gradients down to ``max_norm`` (0: leave them); returns the norm before clipping.

        The only wait of a step for the device: fetches the losses of its micro-steps, too.
        """
        with self._settings():
            norm = torch.nn.utils.clip_grad_norm_(self._trained.values(), max_norm or float("inf"))
        losses, self._step_losses = self._step_losses, []
        return fetch(losses, norm)[0]

    @out_of_memory("update")
    def update(self, *, learning_rate: float) -> None:
        """Take one step of AdamW."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        with self._settings():
            self._optimizer.step()

    @out_of_memory("step")
    def is_finite(self) -> bool:
        """Whether all trained weights and moments are finite."""
        moments = [value for state in self._optimizer.state.values() for value in state.values()]
        return runtime.all_finite([*self._trained.values(), *moments], on_cpu=self._device.type == "cpu")

    def checksum(self) -> int:
        """A sum of the bits of all trained weights, moments and counters, each tensor with its factor."""
        moments = [value for state in self._optimizer.state.values() for value in state.values()]
        return runtime.checksum([*self._trained.values(), *moments], self._device)

    def frozen_checksums(self) -> dict[str, int]:
        """A sum of the bits of each frozen weight and saved buffer, by the model's names."""
        tensors = self.model.state_dict(keep_vars=True).items()
        frozen = {name: tensor for name, tensor in tensors if not tensor.requires_grad}
        return {name: runtime.checksum([tensor], self._device) for name, tensor in frozen.items()}

    @out_of_memory("evaluate")
    def evaluate(self, batch: MicroBatch) -> DeviceLosses:
        """Forward only, without dropout."""
        self._set_mode(training=False)
        with self._settings(), runtime.compiler_errors():
            return self._runner.evaluate(batch)

    @out_of_memory("generate")
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
            with self._settings():
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
            raise_if_out_of_memory(error)
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

    @out_of_memory("load")
    def load_state(self, state: EngineState) -> None:
        """Copy a state of either engine into the parameters; ResumeRefused changes nothing."""
        optimizer.restore(state, self._trained, self._optimizer)
        runtime.load_rng_state(state.rng, self._device)

    def device_for(self, nbytes: int) -> str | None:
        """The CUDA device, if a state of that size leaves half of its free memory; None for the host."""
        has_room = self._device.type == "cuda" and 2 * nbytes <= torch.cuda.mem_get_info(self._device)[0]
        return str(self._device) if has_room else None

    def release_memory(self) -> None:
        """Return freed memory of the device to the system."""
        runtime.release_memory(self._device)

    def device_memory(self) -> DeviceMemory | None:
        """Memory used on the device; None on a CPU."""
        return runtime.device_memory(self._device)

    def close(self) -> None:
        """Release model, optimizer and caches."""
        del self.model, self._modules, self._runner, self._trained, self._optimizer, self.tokenizer
        del self._calls, self._step_losses, self._exchange
        self.release_memory()

    def _clear_gradients(self) -> None:
        self._drop_gradients()
        self._step_losses.clear()
        self._calls.clear()

    def _drop_gradients(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def _train(self, batch: MicroBatch, *, tokens: int) -> None:
        settings = self._settings(warn_only=not self.deterministic)
        self._set_mode(training=True)
        with settings, runtime.compiler_errors():
            self._step_losses.append(self._runner.train(batch, tokens=tokens))

    def _settings(self, **changes: Any) -> AbstractContextManager[None]:
        """Context manager with torch's settings for this engine."""
        return runtime.Settings(self._threads, **changes).use(self._device)

    def _set_mode(self, *, training: bool) -> None:
        # A program may have changed the mode of some. Setting all takes ten times as long as looking at them.
        if {module.training for module in self._modules} != {training}:
            self.model.train(training)

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
