"""What happens to one rank ends a run with a line that is true of all of them."""

from __future__ import annotations

import pytest

TRAIN = """
import os, warnings
from distrust import DistrustTrainer, TrainConfig
from distrust.engines.torch.engine import TorchEngine
from distrust.engines.torch.model_runner import ModelRunner

passes = 0
def fail_later(train):
    def fail(runner, batch, *, tokens):
        global passes
        passes += 1
        if passes == 4:  # of two in each step
            raise RuntimeError("out of memory")
        return train(runner, batch, tokens=tokens)
    return fail

def add_one(prepare):
    def add(engine, *args, **options):
        prepare(engine, *args, **options)
        next(iter(engine._trained.values())).data += 1
    return add

def scenario(options, accident):
    if os.environ["RANK"] == "1" and accident == "memory":
        ModelRunner.train = fail_later(ModelRunner.train)
    elif os.environ["RANK"] == "1":
        TorchEngine._prepare = add_one(TorchEngine._prepare)
    try:
        with warnings.catch_warnings(action="ignore"):
            DistrustTrainer(TrainConfig(**options), observers=[]).train()
    except Exception as error:
        print(error)
        os._exit(1)  # also what is replaced ends
"""


@pytest.fixture
def outcome(world, tiny_model, tiny_config, tmp_path):
    def outcome(accident, **options):
        config = vars(tiny_config(tmp_path, model=str(tiny_model), gradient_accumulation=4, **options))
        leader, follower = world.run(TRAIN, count=2, options=config, accident=accident)
        assert follower.code
        assert follower.stderr == ""
        return leader.stdout + leader.stderr

    return outcome


def test_a_follower_without_memory_does_not_say_what_is_saved(outcome, tmp_path):
    text = outcome("memory", save_every=1)
    assert "rank 1" in text
    assert text.endswith("; the same command resumes from the newest checkpoint, if there is one\n")
    assert [*tmp_path.glob("checkpoints/*.safetensors")]


def test_weights_that_differ_are_noticed_before_the_first_step(outcome):
    assert "step 0: weights or moments are not the same on all ranks" in outcome("weights", max_steps=1)
