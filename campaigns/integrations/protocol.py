"""What the program that is disturbed and its starters agree on; needs no framework."""

from __future__ import annotations

from typing import Literal

PROGRAM = "campaigns.integrations.program:main"  # for the fork server
#: Modules for the fork server to load; none of them starts a thread.
IMPORTS = (
    "peft", "trl.trainer.sft_trainer", "trl.trainer.dpo_trainer", "trl.trainer.reward_trainer",
    "transformers.models.llama.modeling_llama", "distrust.integrations.transformers.checkpoints",
    "campaigns.integrations.warmed",
)  # fmt: skip
#: Who keeps the run: ours, ours without the generators, the Trainer's own checkpoints, or nobody.
Keeper = Literal["distrust", "broken", "trainer", "nobody"]
OURS: Keeper = "distrust"
THEIRS: Keeper = "trainer"
EXAMPLE = "example"  # in place of the name of a case
CHECKPOINTS = "checkpoints"  # in the folder of a case: ours
END = "end.json"  # in the folder of a case: how it ended
