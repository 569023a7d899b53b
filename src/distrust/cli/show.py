"""The command ``distrust show``: the contents of one checkpoint."""

from __future__ import annotations

from typing import Any

from distrust.checkpoint import CheckpointFile
from distrust.cli import targets
from distrust.cli.arguments import TARGET, attributes, parser, print_json
from distrust.errors import CheckpointNotFound, ConfigError, printable, shorten
from distrust.reporting.display import number, size

#: Characters of a value that are printed: enough for any option of a config.
_VALUE_CHARACTERS = 1000


def main(arguments: list[str]) -> int:
    """Show one checkpoint by its header."""
    arg = parser(
        "show",
        description="For a run or directory, the newest checkpoint. Reads only the header.",
        examples=[
            "distrust show runs/train",
            "distrust show runs/train --step 50 --tensors",
            "distrust show runs/train/checkpoints/checkpoint-50.safetensors --json",
        ],
    )
    arg.add_argument("target", type=targets.target, help=TARGET)
    arg.add_argument("--step", type=int, help="the checkpoint of this step; default: the newest")
    arg.add_argument("--tensors", action="store_true", help="list every tensor")
    arg.add_argument("--json", action="store_true", help="print one object, with all tensors")
    options = arg.parse_args(arguments)

    file = _choose(options.target, options.step)
    file.require_intact()  # never print what a forged header claims
    if options.json:
        tensors = [attributes(tensor, "name", "dtype", "shape", "digest") for tensor in file.tensors]
        fields = attributes(file, "path", "format", "step", "kind", "digest", "state_digest", "metadata")
        sections = {"config": file.header.config, "run": file.header.run_info}
        print_json({**fields, **sections, "tensors": tensors})
    else:
        _print(file, tensors=options.tensors)
    return 0


def _choose(target: targets.Target, step: int | None) -> CheckpointFile:
    if step is None:
        return targets.newest(target)  # warns about newer damaged ones
    if targets.is_one(target):
        raise ConfigError(f"--step needs a run or a directory; {target} is one checkpoint")
    files = targets.scan(target).by_step()  # intact headers only
    if step not in files:
        steps = ", ".join(map(str, files)) or "none"
        text = f"{target}: no checkpoint of step {step}; there are {steps}"
        raise CheckpointNotFound(text, path=targets.path_of(target))
    return files[step]


def _print(file: CheckpointFile, *, tensors: bool) -> None:
    run = file.header.run_info
    print(printable(f"{file.path}"))
    created = f", created {shorten(file.created)}" if file.created else ""
    host = f" on {run.get('host')}" if run.get("host") else ""
    print(printable(f"step {file.step}, {file.kind}, {size(file.bytes)}{created}{host}"))
    if file.is_foreign:
        print(f"older format  {file.format}: it has no digests; `distrust convert` adds them")
    else:
        print(f"state digest  {file.state_digest}")
        print(f"file digest   {file.digest}")
    for section in ("model", "optimizer", "rng", "history"):
        members = [tensor for tensor in file.tensors if tensor.name.startswith(f"{section}.")]
        nbytes = sum(tensor.nbytes for tensor in members)
        print(f"{section:9}     {len(members)} tensors, {size(nbytes)}")
    _print_table("metrics", {name: number(value) for name, value in file.metrics.items()})
    _print_table("metadata", file.metadata)
    _print_table("config", file.header.config)
    _print_table("run", run.get("extra", {}))  # options and versions that the state digest leaves out
    if tensors:
        print("tensors")
        for tensor in file.tensors:
            row = f"  {tensor.name}  {tensor.dtype}{list(tensor.shape)}  {tensor.digest[:16]}"
            print(printable(row.rstrip()))  # older formats have no digests


def _print_table(title: str, values: dict[str, Any]) -> None:
    if values:
        print(title)
        for name, value in sorted(values.items(), key=lambda item: str(item[0])):
            print(printable(f"  {shorten(str(name))}: {_truncate(value)}"))


def _truncate(value: Any) -> str:
    """A value as text of bounded length: metadata may be of any length."""
    text = str(value)
    if len(text) <= _VALUE_CHARACTERS:
        return text
    return f"{text[:_VALUE_CHARACTERS]}… ({len(text):,} characters; --json prints all)"
