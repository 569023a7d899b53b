"""The command ``distrust convert``."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from distrust.checkpoint import CheckpointManager
from distrust.checkpoint.catalog import RUN_SUBDIRECTORY
from distrust.cli.arguments import parser, print_json
from distrust.config import TrainConfig, flag, key
from distrust.engines.state_conversion import target_modules
from distrust.importers.convert import ConvertedCheckpoint, convert, target_directory
from distrust.reporting.display import printable
from distrust.run_record import RunRecord


def main(arguments: list[str]) -> int:
    """Write checkpoints of other programs as ours; exit 1 if one could not be converted."""
    arg = parser(
        "convert",
        description=(
            "Each is verified\nbefore as far as its format has checksums, written atomically, read back and "
            "compared; the old ones\nstay as they are. The same command again goes on where it was "
            "stopped. Its last line is the command\nthat trains on. Exit code 1 if one was damaged, "
            "unreadable, incomplete or refused."
        ),
        examples=[
            "distrust convert old/checkpoint-30-final --to runs/first",
            "distrust convert old --to runs/first && distrust ls runs/first",
            "distrust convert output/checkpoint-500 --to runs/first --model ./my-model",
            "distrust convert my-adapter --to runs/first",
        ],
    )
    arg.add_argument(
        "source",
        type=Path,
        help="a checkpoint in an older format or of the transformers Trainer, a folder of such, or an "
        "adapter folder of peft or mlx-lm",
    )
    arg.add_argument(
        "--to", type=Path, required=True, help="a new run, or one with other steps of the same training"
    )
    arg.add_argument("--model", help="base model of a Trainer's or peft's folder, if it lies elsewhere now")
    arg.add_argument(
        "--force", action="store_true", help="replace another state, write beside another training"
    )
    arg.add_argument("--json", action="store_true", help="print a list of objects")
    options = arg.parse_args(arguments)

    def tell(one: ConvertedCheckpoint) -> None:
        if not options.json:
            print(printable(_line(one)), flush=True)

    done = convert(options.source, options.to, force=options.force, model=options.model, report=tell)
    if options.json:
        print_json([_object(one) for one in done])
    well = sum(one.succeeded for one in done)
    directory = target_directory(options.to)
    if not options.json:
        print(printable(f"{well} of {len(done)} stand in {directory}"))
        if unproven := sum(one.succeeded and not one.is_verified for one in done):
            print(
                f"{unproven} of them in a format without checksums: a bit of the weights that had flipped "
                "was not found"
            )
        if well and directory.name == RUN_SUBDIRECTORY:
            print(printable(f"to go on training: {shlex.join(_to_go_on(directory))}"))
    return 0 if well == len(done) else 1


def _to_go_on(directory: Path) -> Iterator[str]:
    """The command that trains on from the newest, with the options that it knows."""
    header = CheckpointManager(directory).scan().files[-1].header
    record = RunRecord.from_header(header)
    model = record.settings.get("model")
    yield from ("distrust", "train", "--out", str(directory.parent))
    yield from ("--model", model if type(model) is str else "MODEL", "--data", "DATA")
    if header.step:  # as many as the whole run has, of which these were made
        yield from ("--max-steps", "STEPS")
    names = (tensor.name.partition(".") for tensor in header.tensors)
    targets = target_modules(name for section, _, name in names if section == "model")
    known = {**({"target_modules": targets} if targets else {}), **record.config}
    for option in fields(TrainConfig):
        value = known.get(key(option.name), option.default)
        if option.metadata["effect"] == "result" and value != option.default:
            yield from _words(flag(option.name), value)


def _words(name: str, value: Any) -> list[str]:
    """An option as it is typed."""
    if type(value) is bool:
        return [name if value else name.replace("--", "--no-", 1)]
    return [name, *map(_word, value if type(value) in (list, tuple) else [value])]


def _word(value: Any) -> str:
    return f"{value:g}" if type(value) is float and float(f"{value:g}") == value else str(value)


def _line(one: ConvertedCheckpoint) -> str:
    if one.target is None:
        return f"{one.source}: {one.outcome}: {one.reason}"
    said = f"{one.source}: {one.outcome}: {one.target}, state {(one.state_digest or '')[:16]}"
    return f"{said} ({one.reason})" if one.reason else said


def _object(one: ConvertedCheckpoint) -> dict[str, object]:
    paths = {"source": str(one.source), "target": None if one.target is None else str(one.target)}
    return {**asdict(one), **paths}
