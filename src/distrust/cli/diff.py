"""The command ``distrust diff``: compares two checkpoints."""

from __future__ import annotations

from dataclasses import asdict

from distrust.checkpoint import CheckpointFile
from distrust.checkpoint.compare import Difference, differences
from distrust.cli import targets
from distrust.cli.arguments import TARGET, attributes, parser, print_json
from distrust.errors import printable
from distrust.run_record import RunRecord

DIGEST_CHARACTERS = 16
#: Differences that are printed; --json has all.
ROWS = 20


def main(arguments: list[str]) -> int:
    """Compare two checkpoints by their headers; exit code 1 if their states differ."""
    arg = parser(
        "diff",
        description="Exit code 0 if the states are equal, 1 if not. Reads only the headers.",
        examples=[
            "distrust diff runs/a runs/b",
            "distrust diff runs/a/checkpoints/checkpoint-50.safetensors runs/b",
        ],
    )
    arg.add_argument("a", type=targets.target, help=f"{TARGET}; of several, the newest")
    arg.add_argument("b", type=targets.target, help="the other one")
    arg.add_argument("--json", action="store_true", help="print one object")
    options = arg.parse_args(arguments)

    a, b = targets.newest(options.a), targets.newest(options.b)  # headers only
    differing = differences(a, b)
    if options.json:
        sides = [attributes(file, "path", "step", "state_digest") for file in (a, b)]
        rows = [asdict(difference) for difference in differing]
        print_json({"equal": not differing, "a": sides[0], "b": sides[1], "differences": rows})
    else:
        _print(a, b, differing)
    return 1 if differing else 0  # like diff(1)


def _print(a: CheckpointFile, b: CheckpointFile, differing: list[Difference]) -> None:
    for side, file in (("a", a), ("b", b)):
        state = file.state_digest[:DIGEST_CHARACTERS]  # enough to compare by eye
        print(printable(f"{side}: step {file.step}, {file.kind}, state {state}, {file.path}"))
    engines = [RunRecord.from_header(file.header).engine for file in (a, b)]  # empty if no training made it
    if differing and all(engines) and engines[0] != engines[1]:
        print(
            printable(
                f"a was made with {engines[0]}, b with {engines[1]}: they use different tensor names and "
                "layouts, so equal values may be listed as different"
            )
        )
    for difference in differing[:ROWS]:
        sides = f"{_shorten_digest(difference.a)} -> {_shorten_digest(difference.b)}"
        print(printable(f"{difference.kind} {difference.name}: {sides}"))
    if len(differing) > ROWS:
        print(f"and {len(differing) - ROWS} more; --json lists all")
    tensors = sum(difference.kind == "tensor" for difference in differing)
    total = len({tensor.name for tensor in (*a.tensors, *b.tensors)})  # of either checkpoint
    print(
        f"different: {len(differing) - tensors} scalars, {tensors} of {total} tensors"
        if differing
        else "equal: the recorded digests are the same, bit for bit (verify reads the data)"
    )


def _shorten_digest(text: str) -> str:
    description, _, digest = text.rpartition(" ")
    return f"{description} {digest[:DIGEST_CHARACTERS]}" if len(digest) == 64 else text
