"""What a Trainer must be, so that its checkpoints can be exact; checked before anything is replaced."""

from __future__ import annotations

from transformers import Trainer
from transformers.trainer_utils import has_length

from distrust.errors import ConfigError

#: The versions whose loops the tests run; private names of the Trainer may move in others.
TESTED_VERSIONS = "transformers 5.3 to 5.24 and trl 1.0 to 1.16"
#: The trainers of TRL that are tested, and the base class of all.
TRL = {"SFTTrainer", "DPOTrainer", "RewardTrainer", "_BaseTrainer"}
#: Methods of a Trainer, some private, that are replaced on the instance.
REPLACED = (
    "get_train_dataloader",
    "train",
    "_init_training_state",
    "_load_best_model",
    "_load_from_checkpoint",
    "_load_optimizer_and_scheduler",
    "_load_rng_state",
    "_load_scaler",
    "_maybe_log_save_evaluate",
    "_save_checkpoint",
)


def require_supported(trainer: Trainer, *, pure_data: bool) -> None:
    """Check that a Trainer is one whose runs can be resumed exactly.

    Raises:
        ConfigError: it is not; the message says what to change.
    """
    if not isinstance(trainer, Trainer):
        raise ConfigError(f"attach() takes a Trainer of transformers or trl, not a {type(trainer).__name__}")
    missing = [name for name in REPLACED if not callable(getattr(trainer, name, None))]
    if missing:
        raise ConfigError(
            f"this Trainer has no {', '.join(missing)}: install a version that was tested: {TESTED_VERSIONS}"
        )
    args, classes = trainer.args, type(trainer).__mro__
    several, accelerator = args.world_size > 1, trainer.accelerator
    is_parallel = getattr(accelerator, "parallelism_config", None)  # in another way
    is_ddp = accelerator.distributed_type.startswith("MULTI_") and not is_parallel
    untested = [
        cls.__name__ for cls in classes if cls.__module__.startswith("trl.") and cls.__name__ not in TRL
    ]
    overrides = [
        f"{cls.__name__}.{name}"
        for cls in classes
        if cls.__module__.split(".")[0] not in ("transformers", "trl")
        for name in REPLACED
        if name in vars(cls) and name not in ("train", "get_train_dataloader")
    ]
    persistent_workers = args.dataloader_persistent_workers and args.dataloader_num_workers > 0
    for unsupported, reason in (
        (untested, f"{untested} keeps state of its own: {', '.join(sorted(TRL))} are supported"),
        (overrides, f"{overrides} would not be called any more: leave it out"),
        (args.n_gpu > 1, "several GPUs are not supported: set CUDA_VISIBLE_DEVICES to one"),
        (trainer.is_fsdp_enabled, "FSDP is not supported: leave out args.fsdp"),
        (trainer.is_deepspeed_enabled, "DeepSpeed is not supported: leave out args.deepspeed"),
        (several and not is_ddp, "several processes are supported under DDP alone: leave out other kinds"),
        (
            several and (args.enable_jit_checkpoint or args.ddp_broadcast_buffers is False),
            "enable_jit_checkpoint and ddp_broadcast_buffers=False let processes differ: leave them out",
        ),
        (args.auto_find_batch_size, "auto_find_batch_size changes the run: give a batch size that fits"),
        (args.ignore_data_skip, "ignore_data_skip trains on other data after a resume: leave it out"),
        (args.save_only_model, "save_only_model leaves out what a resume needs: leave it out"),
        (args.push_to_hub, "push_to_hub would upload nothing: leave it out, and push the trained model"),
        (
            getattr(args, "sync_ref_model", False),
            "sync_ref_model: its model is not saved; leave it out",
        ),
        (
            persistent_workers,
            "dataloader_persistent_workers draws other random numbers after a resume: leave it out",
        ),
        (
            pure_data and not has_length(trainer.train_dataset),
            "pure_data needs a data set with indices and a length: seed a streamed one itself",
        ),
    ):
        if unsupported:
            raise ConfigError(f"DistrustCheckpoints: {reason}")
    if "_save_checkpoint" in vars(trainer):
        raise ConfigError("this Trainer has DistrustCheckpoints already")
