"""The command ``distrust diff``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from distrust.checkpoint import CheckpointFile, catalog
from distrust.checkpoint.compare import differences
from distrust.cli.arguments import TARGET, parser, print_json
from distrust.reporting.display import printable

DIGEST_SHOWN = 16
SHOWN = 20


def main(arguments: list[str]) -> int:
    """Say what differs between two checkpoints, from their headers alone."""
    arg = parser(
        "diff",
        description="Exit code 0 if the states are equal, 1 if not. Reads the headers only.",
        examples=[
            "distrust diff runs/a runs/b",
            "distrust diff runs/a/checkpoints/checkpoint-50.safetensors runs/b",
        ],
    )
    arg.add_argument("a", type=Path, help=f"{TARGET}; of several, the newest")
    arg.add_argument("b", type=Path, help="the other one")
    arg.add_argument("--json", action="store_true", help="print one object")
    options = arg.parse_args(arguments)

    a, b = catalog.newest(options.a), catalog.newest(options.b)
    found = differences(a, b)
    if options.json:
        print_json(
            {
                "equal": not found,
                "a": {"path": str(a.path), "step": a.step, "state_digest": a.state_digest},
                "b": {"path": str(b.path), "step": b.step, "state_digest": b.state_digest},
                "differences": [asdict(difference) for difference in found],
            }
        )
        return 1 if found else 0
    for side, file in (("a", a), ("b", b)):
        state = file.state_digest[:DIGEST_SHOWN]
        print(printable(f"{side}: step {file.step}, {file.kind}, state {state}, {file.path}"))
    engines = _engine(a), _engine(b)
    if found and all(engines) and engines[0] != engines[1]:
        print(
            printable(
                f"a was made with {engines[0]}, b with {engines[1]}: each names its tensors its own way and "
                "lays them out so, and what is the same in both is told as different, too"
            )
        )
    for difference in found[:SHOWN]:
        sides = f"{_short(difference.a)} -> {_short(difference.b)}"
        print(printable(f"{difference.kind} {difference.name}: {sides}"))
    if len(found) > SHOWN:
        print(f"and {len(found) - SHOWN} more; --json lists them all")
    tensors = sum(difference.kind == "tensor" for difference in found)
    either = len({tensor.name for tensor in (*a.tensors, *b.tensors)})
    print(
        f"different: {len(found) - tensors} scalars, {tensors} of {either} tensors"
        if found
        else "equal: by their headers the states are the same, bit for bit"
    )
    return 1 if found else 0


def _engine(file: CheckpointFile) -> str:
    """The name of the engine that made it; empty of what no training made."""
    extra = file.header.run_info.get("extra")
    environment = extra.get("environment") if isinstance(extra, dict) else None
    named = environment.get("engine") if isinstance(environment, dict) else None
    return named if isinstance(named, str) else ""


def _short(text: str) -> str:
    head, _, digest = text.rpartition(" ")
    return f"{head} {digest[:DIGEST_SHOWN]}" if len(digest) == 64 else text
