"""Device, random generators, memory and compiler of torch.

Dropout in micro-step m of step s depends on (seed, s, m) alone: nothing earlier, such as an evaluation or a
resume, can shift it. The generators' state is saved and restored all the same.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from distrust.activity import warn_once
from distrust.checkpoint.memory import trim
from distrust.contract import DeviceMemory
from distrust.engines import runtime
from distrust.errors import ConfigError, ErrorTranslator
from distrust.option_values import Dtype, Precision

_TORCH: Any = torch  # for what it declares no types of
_get_precision, _set_precision = _TORCH._C._get_fp32_precision_getter, _TORCH._C._set_fp32_precision_setter


def choose_device(requested: str, *, local_index: int = 0, local_count: int = 1) -> torch.device:
    """The device that ``--device`` selects; sets the variables that CUDA reads when it starts.

    Each of several ranks on a machine has a GPU of its own, unless ``--device`` names one.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        **{f"cuda:{index}": True for index in range(torch.cuda.device_count())},
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    lacks_cuda = requested.startswith("cuda") and not (available["cuda"] or torch.version.cuda)
    name = f"torch {torch.__version__}, which was built without CUDA," if lacks_cuda else "torch"
    device = torch.device(runtime.choose_device(requested, available, engine=name))
    if device.type == "cuda":
        # Without it, cuBLAS' matrix products may differ from run to run.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"} & os.environ.keys():  # its older names
            # Each step has another number of tokens, which would leave gaps between fixed segments.
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        if local_count > 1 and str(device) == "cuda":
            gpus = torch.cuda.device_count()
            if gpus < local_count:
                raise ConfigError(
                    f"--device {requested}: {local_count} ranks on this machine with {gpus} GPUs: start "
                    f"{gpus} ranks on it, or let them share a GPU by --device cuda:0"
                )
            return torch.device("cuda", local_index)
    return device


def share_of_threads(local_count: int) -> int:
    """CPU threads of each of ``local_count`` ranks on this machine, unless OMP_NUM_THREADS says it."""
    threads = torch.get_num_threads()
    return threads if "OMP_NUM_THREADS" in os.environ else max(1, threads // local_count)


def warn_of_threads(threads: int, local_count: int) -> None:
    """Warn if the threads that a run began with are too many for its ranks on this machine."""
    share = (os.cpu_count() or 1) // local_count
    if local_count > 1 and threads > max(1, share):
        problem = f"{local_count} ranks share {os.cpu_count()} cores, with {threads} threads each"
        warn_once(f"{problem}, as the run began: --threads {share or 1} is faster, and gives other last bits")


def choose_dtype(requested: Dtype, device: torch.device) -> Precision:
    """The precision that ``--dtype`` selects; "auto" is bfloat16 on a GPU that has instructions for it."""
    if requested == "float32" or device.type != "cuda":
        return "float32" if requested == "auto" else requested
    with torch.cuda.device(device):
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16"
    is_auto, name = requested == "auto", torch.cuda.get_device_name(device)
    effect = "it computes in float32" if is_auto else "torch emulates them, which is slow"
    warn_once(f"--dtype {requested}: {name} has no instructions for bfloat16, so {effect}")
    return "float32" if is_auto else "bfloat16"


class Settings(NamedTuple):
    """torch's global settings that an engine changes while it computes."""

    threads: int
    deterministic: bool = True
    warn_only: bool = True  # whether an operation without a deterministic kernel warns instead of failing
    fills_memory: bool = False  # whether deterministic mode writes each new tensor first: no result needs it
    cudnn_attention: bool = False  # would search a plan for each new length

    @classmethod
    def current(cls) -> Settings:
        """Those of the process now."""
        return cls(
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            _TORCH.utils.deterministic.fill_uninitialized_memory,
            _TORCH.backends.cuda.cudnn_sdp_enabled(),
        )

    def _set(self) -> None:
        torch.set_num_threads(self.threads)
        torch.use_deterministic_algorithms(self.deterministic, warn_only=self.warn_only)
        _TORCH.utils.deterministic.fill_uninitialized_memory = self.fills_memory
        _TORCH.backends.cuda.enable_cudnn_sdp(self.cudnn_attention)

    @contextlib.contextmanager
    def use(self, device: torch.device) -> Iterator[None]:
        """Context manager with these settings, on this device; then the process has its own again."""
        previous = self.current()
        try:
            self._set()
            with torch.cuda.device(device if device.type == "cuda" else -1):  # -1: changes nothing
                yield
        finally:
            previous._set()


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Context manager without TF32 or bfloat16 in float32 products; then the program's settings are back."""
    stated = {backend: _stated_precision(backend, "matmul") for backend in ("cuda", "mkldnn")}
    for backend in stated:
        _set_precision(backend, "matmul", "ieee")
    older = torch.get_float32_matmul_precision()  # its older name: an error where they contradict
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(older)  # which also sets both
        for backend, precision in stated.items():
            _set_precision(backend, "matmul", precision)


def _stated_precision(backend: str, operation: str) -> str:
    """What the program has set; "none" where that of all operations, or all backends, applies."""
    effective: str = _get_precision(backend, operation)
    if backend == "generic":
        return effective
    parent = "generic" if operation == "all" else backend
    stated = _stated_precision(parent, "all")
    _set_precision(parent, "all", "ieee" if effective == "tf32" else "tf32")
    is_inherited = _get_precision(backend, operation) != effective
    _set_precision(parent, "all", stated)
    return "none" if is_inherited else effective


def describe(device: torch.device, *, threads: int) -> dict[str, Any]:
    """What computes on a device, for the environment of a run: of a GPU, nothing of its host."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # the program has set it by its newer name
        precision = f"{_TORCH.backends.cuda.matmul.fp32_precision} on CUDA"
    described: dict[str, Any] = {"device": device.type, "matmul_precision": precision}
    if device.type == "cpu":
        described |= {"cpu": torch.backends.cpu.get_cpu_capability(), "threads": threads}
    if device.type == "cuda":
        cuda, kernels = torch.backends.cuda, ("flash", "mem_efficient", "math")
        described |= {
            "device": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "cudnn": _TORCH.backends.cudnn.version(),
            "attention_kernels": [name for name in kernels if getattr(cuda, f"{name}_sdp_enabled")()],
        }
        with contextlib.suppress(OSError):  # not everywhere
            described["driver"] = Path("/sys/module/nvidia/version").read_text().strip()
    return described


def is_deterministic(compute: Callable[[], object], *, model: str) -> bool:
    """Whether all operations of ``compute`` have a deterministic kernel; ends, and warns, at one without."""
    try:
        compute()
    except RuntimeError as error:
        operation, is_named, _ = str(error).partition(" does not have a deterministic implementation")
        if not is_named and "is not deterministic" not in operation:  # of cuBLAS, as the program set it up
            raise
        problem = f"{operation if is_named else 'a matrix product'} has no deterministic kernel here"
        warn_once(f"--model {model}: {problem}, so a resumed or repeated run may differ in the last bits")
        return False
    return True


def reseed(*, seed: int, step: int, micro_step: int) -> None:
    """Seed the generators of every device by these three."""
    torch.manual_seed(runtime.micro_step_seed(seed=seed, step=step, micro_step=micro_step))


def rng_state(device: torch.device) -> dict[str, Any]:
    """State of the generators of the CPU and of the device, as uint8 tensors."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = _accelerator(device).get_rng_state(device)
    return states


def load_rng_state(states: Mapping[str, Any], device: torch.device) -> None:
    """Inverse of :func:`rng_state`; ignores states of other devices and engines."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if device.type != "cpu" and device.type in states:
        _accelerator(device).set_rng_state(states[device.type], device)


@torch.no_grad()
def all_finite(tensors: list[torch.Tensor], *, on_cpu: bool) -> bool:
    """Whether every element of tensors on one device is finite."""
    # A sum is finite only if every term is: one pass, and one synchronization. A GPU runs few kernels for all
    # norms; a CPU is faster at sums.
    sums = [tensor.sum() for tensor in tensors] if on_cpu else torch._foreach_norm(tensors, 1)
    if bool(torch.isfinite(torch.stack([*sums])).all()):
        return True
    # Or a sum of finite terms overflowed: look at each element.
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


@torch.no_grad()
def checksum(tensors: Sequence[torch.Tensor], device: torch.device) -> int:
    """Σ (2i + 1) · the sum of tensor i's elements, read as integers, modulo 2^64; one transfer."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [tensor.view(integers[tensor.element_size()]).sum().to(device) for tensor in tensors]
    factors = 2 * torch.arange(len(sums), device=device) + 1
    return int((torch.stack(sums) * factors).sum())


def device_memory(device: torch.device) -> DeviceMemory | None:
    """Memory used on the device; None for the CPU, whose memory is the host's."""
    if device.type == "cuda":
        stats = torch.cuda.memory_stats(device)  # once: it gathers a hundred counters
        return DeviceMemory(
            allocated=stats["allocated_bytes.all.current"],
            allocated_peak=stats["allocated_bytes.all.peak"],
            reserved=stats["reserved_bytes.all.current"],
            reserved_peak=stats["reserved_bytes.all.peak"],
        )
    if device.type == "mps":
        reserved = torch.mps.driver_allocated_memory()  # MPS records no peak
        return DeviceMemory(torch.mps.current_allocated_memory(), reserved, reserved, reserved)
    return None


def release_memory(device: torch.device) -> None:
    """Return unreferenced memory to the device and to the system."""
    gc.collect()  # modules and hooks form reference cycles
    if device.type != "cpu":
        _accelerator(device).empty_cache()
    trim()


def _accelerator(device: torch.device) -> Any:
    return getattr(torch, device.type)  # torch.cuda or torch.mps


def repeated_blocks(model: Any) -> list[torch.nn.Module]:
    """The layers that a model consists of, as it declares them; empty if it does not."""
    classes = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in classes]


def compile_layers(model: Any) -> int:
    """Have torch compile the repeated blocks of a model, each when it first runs; returns their number.

    One block at a time: blocks of one class share compiled code, and attention, which differs for each packed
    batch, stays outside the graphs.
    """
    blocks = repeated_blocks(model)
    if not blocks:
        raise ConfigError("--compile: this model does not declare its repeated blocks; leave it out")
    for block in blocks:
        block.compile(dynamic=True)  # one graph for all lengths
    return len(blocks)


def compiler_errors() -> ErrorTranslator:
    """Context manager that turns errors of torch's compiler into ConfigError."""

    def translate(error: Exception) -> Exception:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            return error
        reason = " ".join(str(error).split())[:200]
        return ConfigError(f"--compile: torch cannot compile this model here; leave it out ({reason})")

    return ErrorTranslator((Exception,), translate)
