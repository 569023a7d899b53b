"""The command ``distrust verify``."""

from __future__ import annotations

from pathlib import Path

from distrust.checkpoint import store
from distrust.cli.arguments import TARGET, parser, print_json
from distrust.errors import CheckpointError, CorruptCheckpoint
from distrust.reporting.printing import printable


def main(arguments: list[str]) -> int:
    """Read every byte of checkpoints and compare it with the digests; exit 1 if any is damaged."""
    arg = parser(
        "verify",
        description="Exit code 0 if all are whole, 1 if any is damaged or cannot be read.",
        examples=["distrust verify runs/train", "distrust verify runs/*/checkpoints/*-final.safetensors"],
    )
    arg.add_argument("targets", type=Path, nargs="+", metavar="target", help=TARGET)
    arg.add_argument("--json", action="store_true", help="print a list of objects")
    options = arg.parse_args(arguments)

    rows = []
    for path in [path for target in options.targets for path in store.find(target)]:
        verdict, reason = _verdict(path)
        rows.append({"path": str(path), "ok": reason is None, "verdict": verdict, "reason": reason})
        if not options.json:
            print(printable(f"{path}: {verdict}{f': {reason}' if reason else ''}"), flush=True)
    if options.json:
        print_json(rows)
    return 0 if all(row["ok"] for row in rows) else 1


def _verdict(path: Path) -> tuple[str, str | None]:
    """In a word, and why. What cannot be read may be whole."""
    try:
        store.verify(path)
    except CorruptCheckpoint as error:
        return "DAMAGED", error.reason
    except CheckpointError as error:
        return "UNREADABLE", str(error).removeprefix(f"{path}: ")
    return "ok", None
