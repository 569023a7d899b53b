"""The command ``distrust export``: a trained model for other programs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import get_args

from distrust.cli import targets
from distrust.cli.arguments import NEWEST_INTACT, add_checkpoint_options, attributes, parser, print_json
from distrust.errors import printable
from distrust.option_values import ExportDtype, ExportFormat
from distrust.reporting.display import size

LOADED_BY = {
    "adapter": "peft: base.generation_config = GenerationConfig.from_pretrained({path!r}); "
    "PeftModel.from_pretrained(base, {path!r})",
    "mlx": "mlx-lm: load(base, adapter_path={path!r})",
    "merged": "transformers: AutoModelForCausalLM.from_pretrained({path!r})",
    "state": "safetensors: load_file({path!r})",
}


def main(arguments: list[str]) -> int:
    """Export a checkpoint."""
    arg = parser(
        "export",
        description="Every byte of the checkpoint is verified first. The output appears completely or not at "
        "all, and existing files are never overwritten. A folder's README.md records its origin.",
        examples=[
            "distrust export runs/train --to my-adapter",
            "distrust export runs/train --to my-model --format merged --dtype bfloat16",
            "distrust export runs/train --to my-mlx-adapter --format mlx",
            "distrust export runs/train --to weights.safetensors --format state --step 50",
        ],
    )
    arg.add_argument("target", type=targets.target, help=NEWEST_INTACT)
    arg.add_argument(
        "--to",
        type=Path,
        required=True,
        help="the new folder, or for a state the new file; missing parent folders are made",
    )
    arg.add_argument(
        "--format",
        choices=get_args(ExportFormat),  # one definition, in config
        help="adapter: for peft; mlx: for mlx-lm; merged: a full model for transformers; state: the trained "
        "tensors in one file. Default: adapter, or mlx for a run of mlx, or merged if all weights were "
        "trained",
    )
    add_checkpoint_options(arg)
    arg.add_argument(
        "--dtype",
        choices=get_args(ExportDtype),
        help="dtype of the weights; default: float32, as they were trained; for merged, that of the run",
    )
    arg.add_argument("--json", action="store_true", help="print one object")
    options = arg.parse_args(arguments)
    targets.checks(options.target)  # a misspelt name fails before the slow imports below

    from distrust.export import export  # loads a framework

    choices = attributes(options, "format", "step", "best", "model", "dtype")
    result = export(options.target, options.to, **choices)
    if options.json:
        print_json(asdict(result))
        return 0
    print(printable(f"step {result.step} of {result.checkpoint}, state {result.state_digest[:16]}"))
    print(printable(f"{result.format}, {result.dtype}, {size(result.bytes)}: {result.path}"))
    print(printable(f"for {LOADED_BY[result.format].format(path=str(result.path))}"))
    return 0
