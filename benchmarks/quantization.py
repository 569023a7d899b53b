"""Which library quantizes the frozen base best: memory, speed, error and exactness of each that is installed.

    python -m benchmarks.quantization
    python -m benchmarks.quantization --device cuda --dtype bfloat16 --layers 4

A Llama with 135M parameters and random weights is written once; each candidate loads it in its own process,
through the ``quantization_config`` of transformers and LoRA of peft, as a training run would. Columns:

- weights: all live tensors after loading, relative to the model without quantization;
- level: memory between steps, above that before loading (resident; on a GPU, allocated there);
- peak: the maximum during loading or a step; on a CPU, pages of the file that is read count as well;
- step: forward and backward pass, median, relative to the model without quantization; on a CPU, processor
  time of one thread, which other programs disturb least;
- error: ‖logits − logits of float32‖ / ‖logits of float32‖, in training mode;
- bits: whether a second load gives the same gradients, bit for bit;
- evaluation: whether gradients are the same bits before and after an evaluation.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.metadata
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.driver import ROOT
from distrust.checkpoint import memory

#: Layers of the 135M-parameter model; `--layers` makes it smaller.
SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}
BATCH, TOKENS, WARM, TIMED = 1, 64, 1, 3


def _bitsandbytes(bits: int, dtype: Any) -> Any:
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _torchao(bits: int, dtype: Any) -> Any:
    from torchao import quantization
    from transformers import TorchAoConfig

    kind = quantization.Int8WeightOnlyConfig() if bits == 8 else quantization.Int4WeightOnlyConfig()
    return TorchAoConfig(kind)


def _quanto(bits: int, dtype: Any) -> Any:
    from transformers import QuantoConfig

    return QuantoConfig(weights=f"int{bits}")


def _hqq(bits: int, dtype: Any) -> Any:
    from transformers import HqqConfig

    return HqqConfig(nbits=bits, group_size=64)


#: Name of the distribution -> its quantization config.
CANDIDATES: dict[str, Callable[[int, Any], Any]] = {
    "bitsandbytes": _bitsandbytes,
    "torchao": _torchao,
    "optimum-quanto": _quanto,
    "hqq": _hqq,
}


def measure(folder: Path, library: str, bits: int, device: str, dtype: str) -> dict[str, Any]:
    """Measure one candidate, in this process."""
    import torch

    torch.set_num_threads(1)
    number = getattr(torch, dtype)
    make = CANDIDATES.get(library)

    def load() -> Any:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        options: dict[str, Any] = {"dtype": number}
        if make is not None:
            options |= {"quantization_config": make(bits, number), "device_map": {"": device}}
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
        model.config.use_cache = False
        if make is not None:  # otherwise what is not quantized keeps the whole file mapped, as in the engine
            for parameter in model.parameters():
                if type(parameter) is torch.nn.Parameter and parameter.is_floating_point():
                    parameter.data = parameter.data.clone()
        torch.manual_seed(0)
        adapted = get_peft_model(
            model, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
        ).to(device)
        return adapted.train()

    for module in ("peft", "transformers.models.llama.modeling_llama"):
        importlib.import_module(module)  # memory of the libraries is not the model's
    if make is not None:
        make(bits, number)
    base_bytes, level = _peak(device), _level(device)
    model = load()
    gc.collect()
    figures: dict[str, Any] = {"weights": _living_bytes()}
    batch = torch.randint(0, SHAPE["vocab_size"], (BATCH, TOKENS), generator=torch.Generator().manual_seed(1))
    batch = batch.to(device)

    def passes() -> tuple[Any, list[Any]]:
        model.zero_grad(set_to_none=True)
        result = model(input_ids=batch, labels=batch)
        result.loss.backward()
        gradients = [part.grad.clone() for part in model.parameters() if part.grad is not None]
        return result.logits.detach().float().cpu(), gradients

    _, gradients = passes()
    times = []
    for _ in range(WARM + TIMED):
        began = _clock(device)
        _, again = passes()
        times.append(_clock(device) - began)
    figures["step"] = statistics.median(times[WARM:])
    figures["peak"] = _peak(device) - base_bytes
    model.zero_grad(set_to_none=True)
    figures["level"] = _level(device) - level
    repeated = _same(gradients, again)
    model.eval()
    with torch.no_grad():
        model(input_ids=batch)
    model.train()
    figures["evaluation"] = _same(gradients, passes()[1])
    model = None
    gc.collect()
    model = load()
    figures["bits"] = repeated and _same(gradients, passes()[1])
    with torch.no_grad():
        for part in model.modules():  # without its adapter, like the reference
            if hasattr(part, "lora_B"):
                for matrix in part.lora_B.values():
                    matrix.weight.zero_()
    torch.save(passes()[0], folder / f"{library}-{bits}.pt")
    reference = folder / "reference-32.pt"
    if reference.exists():
        exact = torch.load(reference, weights_only=True)
        output = torch.load(folder / f"{library}-{bits}.pt", weights_only=True)
        figures["error"] = float((output - exact).norm() / exact.norm())
    return figures


def _living_bytes() -> int:
    import torch

    sizes = {}
    for item in gc.get_objects():
        if isinstance(item, torch.Tensor):
            try:
                storage = item.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
            except (NotImplementedError, RuntimeError):
                continue  # a wrapper: its parts are counted as well
    sizes.pop(0, None)
    return sum(sizes.values())


def _peak(device: str) -> int:
    """The most bytes taken so far."""
    import torch

    return torch.cuda.max_memory_allocated() if device == "cuda" else memory.peak_resident_bytes()


def _level(device: str) -> int:
    """Bytes taken now."""
    import torch

    gc.collect()
    memory.trim()
    return torch.cuda.memory_allocated() if device == "cuda" else memory.resident_bytes()


def _clock(device: str) -> float:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def _same(first: list[Any], second: list[Any]) -> bool:
    return len(first) == len(second) and all(bool((a == b).all()) for a, b in zip(first, second, strict=True))


def make_model(folder: Path, layers: int) -> None:
    """A Llama with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=layers, tie_word_embeddings=True, **SHAPE)
    LlamaForCausalLM(config).save_pretrained(folder)


def main() -> int:
    """Measure all that are installed, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--child", nargs=3, metavar=("FOLDER", "LIBRARY", "BITS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        folder, library, bits = options.child
        print(json.dumps(measure(Path(folder), library, int(bits), options.device, options.dtype)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), options.layers)
        _run(folder, "reference", 32, options.device, "float32")
        plain, _ = _run(
            folder, "none", 16 if options.dtype == "bfloat16" else 32, options.device, options.dtype
        )
        print(
            f"{options.device}, {options.dtype}, {options.layers} layers; unquantized: {_line(plain, plain)}"
        )
        print("| library | bits | weights | level | peak | step | error | bits | evaluation |")
        print("|---|---|---|---|---|---|---|---|---|")
        for library in CANDIDATES:
            for bits in (8, 4):
                figures, why = _run(folder, library, bits, options.device, options.dtype)
                row = _line(figures, plain) if figures else f"{why} | | | | | |"
                print(f"| {library} {_version(library)} | {bits} | {row} |", flush=True)
    return 0


def _run(folder: str, library: str, bits: int, device: str, dtype: str) -> tuple[dict[str, Any], str]:
    """Measure a candidate in a fresh process; returns its figures, or the reason why there are none."""
    if library in CANDIDATES and _version(library) == "":
        return {}, "not installed"
    process = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.quantization", "--device", device, "--dtype", dtype),
            *("--child", folder, library, str(bits)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if process.returncode:
        return {}, (process.stderr.strip().splitlines() or ["ended"])[-1][:72]
    figures: dict[str, Any] = json.loads(process.stdout.strip().splitlines()[-1])
    return figures, ""


def _line(found: dict[str, Any], plain: dict[str, Any]) -> str:
    cells = [
        f"{found['weights'] / 2**20:.0f} MiB ({found['weights'] / plain['weights']:.2f})",
        f"{found['level'] / 2**20:.0f} MiB",
        f"{found['peak'] / 2**20:.0f} MiB",
        f"{found['step'] * 1e3:.0f} ms ({found['step'] / plain['step']:.2f})",
        f"{found.get('error', 0):.2g}",
        "same" if found["bits"] else "**differ**",
        "same" if found["evaluation"] else "**differ**",
    ]
    return " | ".join(cells)


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
