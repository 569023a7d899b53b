"""The command ``distrust verify``: reads every byte of checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from distrust.checkpoint import CheckpointFile, catalog
from distrust.checkpoint.remote.location import ObjectPath
from distrust.cli import targets
from distrust.cli.arguments import TARGET, parser, print_json
from distrust.errors import CheckpointError, CorruptCheckpoint, RemoteError, printable


def main(arguments: list[str]) -> int:
    """Verify checkpoints against their digests; exit code 1 unless all are ok."""
    arg = parser(
        "verify",
        description="Exit code 0 if all are ok; 1 if any is DAMAGED, UNREADABLE (by this process), or NOT A "
        "CHECKPOINT.",
        examples=["distrust verify runs/train", "distrust verify runs/*/checkpoints/*-final.safetensors"],
    )
    arg.add_argument("targets", type=targets.target, nargs="+", metavar="target", help=TARGET)
    arg.add_argument("--json", action="store_true", help="print a list of objects")
    options = arg.parse_args(arguments)

    rows = []
    for path, verify in [each for target in options.targets for each in targets.checks(target).items()]:
        verdict, reason, note = _verify(path, verify)
        row = {"path": path, "ok": reason is None, "verdict": verdict, "reason": reason}
        rows.append({**row, "note": note} if note else row)  # only older formats have notes
        if not options.json:
            remark = reason or note
            print(printable(f"{path}: {verdict}{f': {remark}' if remark else ''}"), flush=True)
    if options.json:
        print_json(rows)
    return 0 if all(row["ok"] for row in rows) else 1  # for scripts


def _verify(path: Path, verify: Callable[[], CheckpointFile]) -> tuple[str, str | None, str | None]:
    """The verdict on a checkpoint; the reason, unless it is ok; and a note, if it is."""
    try:
        file = verify()  # reads every byte
    except CorruptCheckpoint as error:
        # A file of another program is not damaged. Of objects, only those with a checkpoint's name are read.
        if not isinstance(path, ObjectPath) and not catalog.looks_like_checkpoint(path):
            return "NOT A CHECKPOINT", "neither its name nor its first bytes are those of a checkpoint", None
        return "DAMAGED", error.reason, None  # the file never matches its digests again
    except (CheckpointError, RemoteError) as error:  # not DAMAGED: it may be intact
        return "UNREADABLE", str(error).removeprefix(f"{path}: "), None
    return "ok", None, _note(file)


def _note(file: CheckpointFile) -> str | None:
    """What could not be checked, because an older format has no digests."""
    if not file.is_foreign:
        return None
    if file.metadata_only:
        return f"older format ({file.format}): metadata only, no model and no optimizer"
    if file.format == "directory":
        return "older format (directory): every file matches its checksum"
    return f"older format ({file.format}): it has no checksums, only consistency was checked"
