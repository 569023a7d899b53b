"""What the loss of a large vocabulary costs: all logits at once, or in chunks.

    python -m benchmarks.training.loss
    python -m benchmarks.training.loss --vocabulary 262144 --tokens 4096 --width 2048

Each method runs in fresh processes in turn: the products of the head, the weighted cross-entropy of each
token, and the gradient of the head's inputs. Memory is the peak of the process above its level before.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.driver import ROOT

WAYS = ("all logits", "in chunks")


def main() -> int:
    """Measure both methods, and compare their results."""
    options = _options()
    if options.method:
        print(json.dumps(_one(options)))
        return 0
    figures: dict[str, list[dict[str, Any]]] = {method: [] for method in WAYS}
    for _ in range(options.rounds):
        for method in WAYS:
            figures[method].append(_child(method))
    table = Table(title=f"{options.tokens:,} tokens, a vocabulary of {options.vocabulary:,}, float32")
    for heading in ("method", "seconds", "memory MiB", "loss", "norm of the gradient"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for method, runs in figures.items():
        middle = {name: statistics.median(each[name] for each in runs) for name in runs[0]}
        table.add_row(
            method,
            f"{middle['seconds']:.2f}",
            f"{middle['bytes'] / 2**20:,.0f}",
            f"{middle['loss']:.6f}",
            f"{middle['norm']:.6f}",
        )
    Console(highlight=False).print(table)
    return 0


def _child(method: str) -> dict[str, Any]:
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.training.loss", *sys.argv[1:], "--method", method],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if process.returncode != 0:
        raise SystemExit(process.stderr)
    figures: dict[str, Any] = json.loads(process.stdout)
    return figures


def _one(options: argparse.Namespace) -> dict[str, float]:
    import torch

    from distrust.engines.torch.loss import chunked_losses, token_losses

    torch.manual_seed(0)
    head = torch.nn.Linear(options.width, options.vocabulary, bias=False)
    head.weight.requires_grad_(False)
    hidden = torch.randn(options.tokens, options.width, requires_grad=True)
    targets = torch.randint(options.vocabulary, (options.tokens,))
    scales = torch.rand(options.tokens) / options.tokens
    peak_before, began = _most_bytes(), time.perf_counter()
    if options.method == "in chunks":
        loss, _ = chunked_losses(hidden, head, targets, scales)
    else:
        loss = (token_losses(head(hidden), targets) * scales).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    seconds = time.perf_counter() - began
    assert hidden.grad is not None
    return {
        "seconds": seconds,
        "bytes": _most_bytes() - peak_before,
        "loss": float(loss),
        "norm": float(hidden.grad.norm()),
    }


def _most_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training.loss",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--vocabulary", type=int, default=131_072)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--method", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
