"""The command ``distrust convert``."""

from __future__ import annotations

import shlex
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path

from distrust.checkpoint import CheckpointManager
from distrust.checkpoint.catalog import RUN_SUBDIRECTORY
from distrust.checkpoint.remote.location import require_path
from distrust.cli import targets
from distrust.cli.arguments import NEWEST_INTACT, add_checkpoint_options, attributes, parser, print_json
from distrust.config import TrainConfig, key
from distrust.config_text import to_words
from distrust.engines import require_installed
from distrust.engines.state_conversion import target_modules
from distrust.errors import ConfigError, printable
from distrust.importers.convert import ConvertedCheckpoint, convert, target_directory
from distrust.run_record import RunRecord


def main(arguments: list[str]) -> int:
    """Convert checkpoints of other programs; exit code 1 if one could not be converted."""
    arg = parser(
        "convert",
        description=(
            "A run can resume from the result.\n"
            "Each is verified as far as its format allows, written atomically, read back and compared.\n"
            "The originals are never changed. The same command resumes an interrupted conversion.\n"
            "The last line of the output is the command that resumes training. Exit code 1 if a checkpoint\n"
            "was damaged, unreadable, incomplete or refused.\n"
            "The way back: --format trainer writes a folder that the transformers Trainer resumes from."
        ),
        examples=[
            "distrust convert old/checkpoint-30-final --to runs/first",
            "distrust convert old --to runs/first && distrust ls runs/first",
            "distrust convert output/checkpoint-500 --to runs/first --model ./my-model",
            "distrust convert my-adapter --to runs/first",
            "distrust convert runs/first --to output/checkpoint-500 --format trainer --step 500",
        ],
    )
    arg.add_argument(
        "source",
        type=targets.target,
        help="a checkpoint in an older format or of the transformers Trainer, a folder of them, or an "
        f"adapter folder of peft or mlx-lm; with --format trainer, {NEWEST_INTACT}",
    )
    arg.add_argument(
        "--to",
        type=Path,
        required=True,
        help="a new run, or one with other steps of the same training; with --format trainer, a new folder "
        "such as OUTPUT_DIR/checkpoint-STEP, where resume_from_checkpoint=True finds it; parents are created",
    )
    arg.add_argument("--format", choices=["run", "trainer"], default="run", help="what --to is; default: run")
    add_checkpoint_options(arg)
    arg.add_argument(
        "--force",
        action="store_true",
        help="replace a checkpoint that has another state; write next to checkpoints of another training",
    )
    arg.add_argument("--json", action="store_true", help="print a list of objects")
    options = arg.parse_args(arguments)
    if options.format == "trainer":
        return _to_trainer(options)
    source = require_path(str(options.source), "source")  # of other programs; --format trainer reads URLs
    if options.best or options.step is not None:
        raise ConfigError("--step and --best go with --format trainer: otherwise all are converted")

    def report(result: ConvertedCheckpoint) -> None:
        if not options.json:
            print(printable(_line(result)), flush=True)

    results = convert(source, options.to, force=options.force, model=options.model, report=report)
    succeeded = [result for result in results if result.succeeded]
    if options.json:
        print_json([asdict(result) for result in results])
    else:
        _print_summary(target_directory(options.to), succeeded, total=len(results))
    return 0 if len(succeeded) == len(results) else 1


def _to_trainer(options: Namespace) -> int:
    if options.force:
        raise ConfigError("--force goes with --format run: other folders are never replaced")
    require_installed("torch", purpose="--format trainer")
    from distrust.export.to_trainer import to_trainer

    file, dropped = to_trainer(options.source, options.to, **attributes(options, "step", "best", "model"))
    if options.json:
        result = attributes(file, "path", "step", "state_digest")
        print_json([{**result, "to": options.to, "dropped": dropped}])
        return 0
    print(printable(f"{file.path}: converted: {options.to}, state {file.state_digest[:16]}"))
    for line in dropped:
        print(printable(f"dropped: {line}"))
    print(printable(f"to resume training: trainer.train(resume_from_checkpoint={str(options.to)!r})"))
    return 0


def _print_summary(directory: Path, succeeded: list[ConvertedCheckpoint], *, total: int) -> None:
    print(printable(f"{len(succeeded)} of {total} are in {directory}"))
    if unverified := sum(not result.is_verified for result in succeeded):
        print(f"{unverified} of them in a format without checksums: flipped bits of weights go undetected")
    if succeeded and directory.name == RUN_SUBDIRECTORY:
        print(printable(f"to resume training: {shlex.join(_resume_command(directory))}"))


def _resume_command(directory: Path) -> Iterator[str]:
    """The command that resumes from the newest checkpoint, with the options that it proves."""
    header = CheckpointManager(directory).scan().files[-1].header
    record = RunRecord.from_header(header)
    model = record.settings.get("model")
    yield from ("distrust", "train", "--out", str(directory.parent))
    yield from ("--model", model if type(model) is str else "MODEL", "--data", "DATA")
    if header.step:  # the steps of the whole run; the default would be too few
        yield from ("--max-steps", "STEPS")
    names = (tensor.name.partition(".") for tensor in header.tensors)
    targets = target_modules(name for section, _, name in names if section == "model")
    proven = {**({"target_modules": targets} if targets else {}), **record.config}
    for option in fields(TrainConfig):
        value = proven.get(key(option.name), option.default)
        if option.metadata["effect"] == "result" and value != option.default:
            yield from to_words(option.name, value)


def _line(result: ConvertedCheckpoint) -> str:
    if result.target is None:
        return f"{result.source}: {result.outcome}: {result.reason}"
    digest = (result.state_digest or "")[:16]
    line = f"{result.source}: {result.outcome}: {result.target}, state {digest}"
    return f"{line} ({result.reason})" if result.reason else line
