"""What is disturbed: trainers of transformers and TRL, and example scripts of these and other libraries."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from campaigns.child import ROOT
from campaigns.integrations.digest import digest
from campaigns.integrations.protocol import CHECKPOINTS, END, EXAMPLE, IMPORTS, OURS, THEIRS
from distrust.checkpoint import load_file

End = dict[str, Any]
EXAMPLES = ROOT / "examples"
CHECKPOINT = "checkpoint-*.safetensors"  # a file of ours
_BEGAN = re.compile(r"begins at ([1-9]\d*)$")


class TrainerSubject:
    """A case that the Trainer can keep with our checkpoints and with its own."""

    imports = IMPORTS

    def __init__(self, name: str, *, pure_data: bool = False) -> None:
        self.name = name
        #: The Trainer has no way to keep pure data: its own resume is compared with a run of its own.
        self.keepers = (OURS,) if pure_data else (OURS, THEIRS)
        self.undisturbed = OURS if pure_data else "nobody"

    def directory(self, folder: Path) -> Path:
        """Where our checkpoints are."""
        return folder / CHECKPOINTS

    def arguments(self, keeper: str, folder: Path) -> list[str]:
        return [self.name, keeper, str(folder)]

    def has_resumed(self, printed: Sequence[str], *, had_checkpoint: bool) -> bool:
        """Whether a process with this output began from a checkpoint."""
        return any(map(_BEGAN.match, printed))

    def end(self, folder: Path) -> End:
        """The state that the program has written; see :func:`campaigns.integrations.program.end_of`."""
        end: End = json.loads((folder / END).read_text())
        return end


class ExampleSubject:
    """A script that works in a folder; equal runs end in the same last line, weights and moments."""

    keepers = (OURS,)
    undisturbed = OURS

    def __init__(self, script: str, imports: Sequence[str], *, directory: str = CHECKPOINTS) -> None:
        self.name = f"examples/{script}"
        self.imports = tuple(imports)  # for the fork server
        self._script = script
        self._directory = directory  # of its checkpoints, in the folder

    def directory(self, folder: Path) -> Path:
        """Where its checkpoints are."""
        return folder / self._directory

    def arguments(self, keeper: str, folder: Path) -> list[str]:
        return [EXAMPLE, keeper, str(folder), str(EXAMPLES / self._script)]

    def has_resumed(self, printed: Sequence[str], *, had_checkpoint: bool) -> bool:
        """Whether a process with this output began from a checkpoint."""
        return had_checkpoint

    def end(self, folder: Path) -> End:
        """The last line that was printed; weights and moments of the newest checkpoint."""
        newest = max(self.directory(folder).glob(CHECKPOINT), key=lambda path: int(path.stem.split("-")[1]))
        checkpoint = load_file(newest)
        return {
            "printed": (folder / "out.txt").read_text().splitlines()[-1],
            "weights": digest(checkpoint.model),
            "moments": digest(checkpoint.optimizer),
        }


SUBJECTS: tuple[TrainerSubject | ExampleSubject, ...] = (
    TrainerSubject("Trainer"),
    TrainerSubject("Trainer, accumulation, 2 workers"),
    TrainerSubject("Trainer, evaluation"),
    TrainerSubject("Trainer, best model at the end"),
    TrainerSubject("Trainer, grouped by length"),
    TrainerSubject("Trainer, random collator, pure data", pure_data=True),
    TrainerSubject("Trainer, streamed, three passes"),
    TrainerSubject("SFTTrainer"),
    TrainerSubject("SFTTrainer, packing"),
    TrainerSubject("DPOTrainer"),
    TrainerSubject("RewardTrainer"),
    ExampleSubject("transformers_trainer.py", IMPORTS),
    ExampleSubject("trl_sft.py", IMPORTS),
    ExampleSubject("mlx_lm_lora.py", IMPORTS[:1]),  # mlx itself is imported in each fork
    ExampleSubject("lightning_module.py", ("lightning", "torchdata.stateful_dataloader"), directory="."),
)
