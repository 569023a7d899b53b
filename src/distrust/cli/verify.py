"""The command ``distrust verify``."""

from __future__ import annotations

from pathlib import Path

from distrust.checkpoint import CheckpointFile, catalog
from distrust.checkpoint.header import Header
from distrust.cli.arguments import TARGET, parser, print_json
from distrust.errors import CheckpointError, CorruptCheckpoint
from distrust.reporting.display import printable


def main(arguments: list[str]) -> int:
    """Read every byte of checkpoints and compare it with the digests; exit 1 unless all are whole."""
    arg = parser(
        "verify",
        description=(
            "Exit code 0 if all are whole, 1 if any is\n"
            "DAMAGED, UNREADABLE by this process, or NOT A CHECKPOINT."
        ),
        examples=["distrust verify runs/train", "distrust verify runs/*/checkpoints/*-final.safetensors"],
    )
    arg.add_argument("targets", type=Path, nargs="+", metavar="target", help=TARGET)
    arg.add_argument("--json", action="store_true", help="print a list of objects")
    options = arg.parse_args(arguments)

    rows = []
    for path in [path for target in options.targets for path in catalog.resolve(target)]:
        verdict, reason, note = _verdict(path)
        row = {"path": str(path), "ok": reason is None, "verdict": verdict, "reason": reason}
        rows.append({**row, "note": note} if note else row)
        if not options.json:
            said = reason or note
            print(printable(f"{path}: {verdict}{f': {said}' if said else ''}"), flush=True)
    if options.json:
        print_json(rows)
    return 0 if all(row["ok"] for row in rows) else 1


def _verdict(path: Path) -> tuple[str, str | None, str | None]:
    """In a word, and why; and what to know of one that is well. What cannot be read may be whole."""
    try:
        file = catalog.verify(path)
    except CorruptCheckpoint as error:
        if not catalog.looks_like_checkpoint(path):  # another program's file is not damaged
            return "NOT A CHECKPOINT", "neither its name nor its first bytes are those of a checkpoint", None
        return "DAMAGED", error.reason, None
    except CheckpointError as error:
        return "UNREADABLE", str(error).removeprefix(f"{path}: "), None
    return "ok", None, _note(file)


def _note(file: CheckpointFile) -> str | None:
    """What an older format leaves open."""
    if isinstance(file.header, Header):
        return None
    if file.header.lacks_arrays:
        return f"older format ({file.format}): metadata only, no model and no optimizer"
    if file.format == "directory":
        return "older format (directory): every file matches its checksum"
    return f"older format ({file.format}): it has no checksums, only consistency was checked"
