"""The runs that are disturbed: a trainer, its options, and where a test kills it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from campaigns.integrations import trainers

#: Where in a step: after a micro-batch that does not end one, at its end, or as soon as its save has begun.
#: ``stop`` is a SIGTERM after a micro-batch, which the Trainer answers with a checkpoint; with ``grace``, a
#: SIGKILL follows at the end of the step.
Moment = Literal["micro-batch", "step", "save", "stop", "grace"]


class Kill(NamedTuple):
    """A signal to the process itself, at an exact moment."""

    moment: Moment
    step: int  # how many steps are complete by then

    @property
    def text(self) -> str:
        return f"{self.moment}:{self.step}"

    @classmethod
    def parse(cls, text: str) -> Kill:
        moment, step = text.split(":")
        return cls(moment, int(step))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[..., Any]  # (folder, options, **details) -> trainer
    options: Mapping[str, Any]  # of its TrainingArguments
    kills: tuple[Kill, ...]
    details: dict[str, Any] = field(default_factory=dict)  # for ``build``
    pure_data: bool = False

    def trainer(self, folder: Path) -> Any:
        return self.build(folder, self.options, **self.details)


#: One step per micro-batch, over two passes of eleven. The second save is killed beside its background write.
SHORT: dict[str, Any] = {"max_steps": 16}
SHORT_KILLS = (Kill("save", 6), Kill("step", 14))
#: Steps of four micro-batches, the last of each pass of three: over three passes.
ACCUMULATED: dict[str, Any] = {"max_steps": 9, "gradient_accumulation_steps": 4, "save_steps": 2}
ACCUMULATED_KILLS = (Kill("save", 4), Kill("micro-batch", 7))
WORKERS: dict[str, Any] = {"dataloader_num_workers": 2}
EVALUATION: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 4}
PASSES: dict[str, Any] = {"max_steps": 30, "save_steps": 4}  # three, over streamed data
PASSES_KILLS = (Kill("step", 14), Kill("save", 24))
TEXTS: dict[str, Any] = {"records": trainers.plain_texts}
RANDOM: dict[str, Any] = {"collator": trainers.pad_and_mask_at_random}
STREAMED: dict[str, Any] = {"rows": trainers.stream}
#: The longer it trains, the worse it is at other words: the first evaluation is the best.
BEST: dict[str, Any] = {
    "eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "learning_rate": 2e-2,
}  # fmt: skip


def _plain(name: str, options: Mapping[str, Any], kills: tuple[Kill, ...], **details: Any) -> Case:
    pure_data = details.pop("pure_data", False)
    return Case(name, trainers.plain_trainer, options, kills, details, pure_data)


def _sft(name: str, options: Mapping[str, Any], kills: tuple[Kill, ...], **details: Any) -> Case:
    return Case(name, trainers.sft_trainer, options, kills, {**TEXTS, **details})


CASES = (
    _plain("Trainer", SHORT, SHORT_KILLS),
    _plain("Trainer, 2 workers", SHORT | WORKERS, SHORT_KILLS),
    _plain("Trainer, accumulation", ACCUMULATED, ACCUMULATED_KILLS),
    _plain("Trainer, accumulation, 2 workers", ACCUMULATED | WORKERS, ACCUMULATED_KILLS),
    _plain("Trainer, evaluation", SHORT | EVALUATION, SHORT_KILLS),
    _plain("Trainer, best model at the end", SHORT | BEST, SHORT_KILLS,
           eval_words=trainers.OTHER_WORDS),
    _plain("Trainer, grouped by length", SHORT | {"train_sampling_strategy": "group_by_length"}, SHORT_KILLS),
    _plain("Trainer, random collator, pure data", SHORT, SHORT_KILLS, **RANDOM, pure_data=True),
    _plain("Trainer, random collator, pure data, 2 workers", SHORT | WORKERS, SHORT_KILLS,
           **RANDOM, pure_data=True),
    _plain("Trainer, streamed, three passes", PASSES, PASSES_KILLS, **STREAMED),
    _plain("Trainer, streamed, three passes, 2 workers", PASSES | WORKERS, PASSES_KILLS, **STREAMED),
    _plain("Trainer, stopped by SIGTERM", ACCUMULATED | {"save_steps": 3, "enable_jit_checkpoint": True},
           (Kill("grace", 4), Kill("stop", 7))),
    _sft("SFTTrainer", SHORT, SHORT_KILLS),
    _sft("SFTTrainer, packing", {"max_steps": 12, "save_steps": 2, "packing": True},
         (Kill("save", 4), Kill("step", 9))),
    _sft("SFTTrainer, accumulation, evaluation, 2 workers", ACCUMULATED | EVALUATION | WORKERS,
         ACCUMULATED_KILLS),
    _sft("SFTTrainer, completions", SHORT | {"completion_only_loss": True}, SHORT_KILLS,
         records=trainers.completions),
    _sft("SFTTrainer, assistant's turns", SHORT | {"assistant_only_loss": True}, SHORT_KILLS,
         records=trainers.conversations),
    Case("DPOTrainer", trainers.dpo_trainer, SHORT, SHORT_KILLS),
    Case("RewardTrainer", trainers.reward_trainer, SHORT, SHORT_KILLS),
)  # fmt: skip
#: What only ``pure_data`` makes exact.
RANDOM_DATA = _plain("Trainer, random collator", SHORT, SHORT_KILLS, **RANDOM)

BY_NAME = {case.name: case for case in (*CASES, RANDOM_DATA)}
