"""Exhausted memory: which errors of a framework say so, and what a user can lower."""

from __future__ import annotations

from typing import Literal

from distrust.errors import ErrorTranslator, OutOfMemory

Task = Literal["load", "step", "update", "evaluate", "generate"]

#: For each task its description, and what makes it fit.
_ADVICE: dict[Task, str] = {
    "load": "to load the model: use a smaller --model or, with LoRA, --quantization 4bit or --dtype bfloat16",
    "step": "for a step: lower --batch-size (and raise --gradient-accumulation) or --max-length, or add "
    "--gradient-checkpointing",
    "update": "for the optimizer and its moments: train an adapter (--lora-rank), or one of a lower rank",
    "evaluate": "to evaluate a batch: lower --batch-size",
    "generate": "to generate: shorten the prompt, or lower --max-new-tokens",
}
#: In a RuntimeError of torch for a CPU, CUDA, cuBLAS and MPS, and of mlx.
_PHRASES = (
    "out of memory", "can't allocate memory", "alloc_failed", "invalid buffer size",
    "unable to allocate", "attempting to allocate", "insufficient memory",
)  # fmt: skip
#: ``cudaErrorMemoryAllocation``: of the device, or of page-locked memory; in HIP, too.
_CUDA_ERROR_MEMORY_ALLOCATION = 2


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is exhausted.

    Only a plain RuntimeError is judged by its text. Its subclasses mean something else, but for torch's own
    class for exhausted memory, and ``torch.AcceleratorError``, by its code: every failed call of CUDA is one,
    also an illegal memory access.
    """
    if type(error) is RuntimeError:
        return any(phrase in str(error).lower() for phrase in _PHRASES)
    name = type(error).__name__  # nothing here imports torch
    if name == "AcceleratorError" and hasattr(error, "error_code"):
        return bool(error.error_code == _CUDA_ERROR_MEMORY_ALLOCATION)
    return isinstance(error, MemoryError) or name == "OutOfMemoryError"


def raise_if_out_of_memory(error: Exception) -> None:
    """Raise the error again if it says so: then a trial that failed tells nothing about the model."""
    if is_out_of_memory(error):
        raise error


def describe(error: Exception, task: Task) -> OutOfMemory:
    """The one-line error for such an error during a task."""
    reason = " ".join(str(error).split())[:200]
    return OutOfMemory(f"there is not enough memory {_ADVICE[task]}" + (f" ({reason})" if reason else ""))


def out_of_memory(task: Task) -> ErrorTranslator:
    """Context manager and decorator that raises OutOfMemory for errors that say so; others pass unchanged."""

    def translate(error: Exception) -> Exception:
        return describe(error, task) if is_out_of_memory(error) else error

    return ErrorTranslator((MemoryError, RuntimeError), translate)
