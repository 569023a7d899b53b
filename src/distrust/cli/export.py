"""The command ``distrust export``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import get_args

from distrust.checkpoint.catalog import resolve
from distrust.cli.arguments import TARGET, add_choice_of_checkpoint, parser, print_json
from distrust.config import ExportDtype, ExportFormat
from distrust.reporting.display import printable, size

LOADED_BY = {
    "adapter": "peft: PeftModel.from_pretrained(base, {path!r})",
    "mlx": "mlx-lm: load(base, adapter_path={path!r})",
    "merged": "transformers: AutoModelForCausalLM.from_pretrained({path!r})",
    "state": "safetensors: load_file({path!r})",
}


def main(arguments: list[str]) -> int:
    """Write what a checkpoint holds in a form that other programs load."""
    arg = parser(
        "export",
        description=(
            "Every byte of the checkpoint is verified before. The folder appears wholly or not at all, tells "
            "in its README.md where it comes from, and nothing that is there already is written over."
        ),
        examples=[
            "distrust export runs/train --to my-adapter",
            "distrust export runs/train --to my-model --format merged --dtype bfloat16",
            "distrust export runs/train --to my-mlx-adapter --format mlx",
            "distrust export runs/train --to weights.safetensors --format state --step 50",
        ],
    )
    arg.add_argument("target", type=Path, help=f"{TARGET}; of several, the newest that is whole")
    arg.add_argument(
        "--to",
        type=Path,
        required=True,
        help="the new folder, or for a state the new file; the folders above it are made",
    )
    arg.add_argument(
        "--format",
        choices=get_args(ExportFormat),
        help="adapter: for peft; mlx: for mlx-lm; merged: a model, for transformers; state: the trained "
        "tensors in one file. Default: adapter; of a run of mlx, mlx; merged, where all weights were trained",
    )
    add_choice_of_checkpoint(arg)
    arg.add_argument(
        "--dtype",
        choices=get_args(ExportDtype),
        help="of the weights; default: of a merged model that of the run, else float32, as they were trained",
    )
    arg.add_argument("--json", action="store_true", help="print one object")
    options = arg.parse_args(arguments)
    resolve(options.target)  # a wrong name is told before the frameworks are loaded

    from distrust.export import export

    done = export(
        options.target,
        options.to,
        format=options.format,
        step=options.step,
        best=options.best,
        model=options.model,
        dtype=options.dtype,
    )
    if options.json:
        print_json({**asdict(done), "path": str(done.path), "checkpoint": str(done.checkpoint)})
        return 0
    print(printable(f"step {done.step} of {done.checkpoint}, state {done.state_digest[:16]}"))
    print(printable(f"{done.format}, {done.dtype}, {size(done.bytes)}: {done.path}"))
    print(printable(f"for {LOADED_BY[done.format].format(path=str(done.path))}"))
    return 0
