"""Ranks save at the same steps, whatever their clocks say: the leader's decides."""

from __future__ import annotations

TRAIN = """
import os, time
from unittest import mock
from distrust import CheckpointManager, DistrustTrainer, TrainConfig
from distrust.engines.torch.engine import TorchEngine
from distrust.training import agreement

def scenario(options):
    late, agreements, real = 0.0, 0, time.perf_counter
    clip, agree = TorchEngine.clip_gradients, agreement.Requests.agree

    def clip_slowly(*arguments):
        nonlocal late
        late += 10.0 if os.environ.get("RANK", "0") == "0" else 60.0
        return clip(*arguments)

    def count_agreement(*arguments):
        nonlocal agreements
        agreements += 1
        return agree(*arguments)

    with (
        mock.patch.object(time, "perf_counter", lambda: real() + late),
        mock.patch.object(TorchEngine, "clip_gradients", clip_slowly),
        mock.patch.object(agreement.Requests, "agree", count_agreement),
    ):
        ended = DistrustTrainer(TrainConfig(**options), observers=[]).train()
    saved = CheckpointManager(options["out"] + "/checkpoints").list_checkpoints()
    return ended.state_digest, saved, agreements
"""


def test_the_clock_of_the_leader_decides(world, tiny_model, tiny_config, tmp_path):
    def train(count, save_every):
        options = {"model": str(tiny_model), "gradient_accumulation": 4, "max_steps": 5, "keep_last": 9}
        config = tiny_config(tmp_path / f"{count}", save_every=save_every, **options)
        outcomes = world.run(TRAIN, count=count, options=vars(config))
        assert [outcome.error for outcome in outcomes] == [None] * count
        (value,) = {(digest, tuple(saved), number) for digest, saved, number in (o.value for o in outcomes)}
        return value

    of_two = train(2, "20s")
    assert of_two == train(1, 2)
    assert of_two[1] == (2, 4, 5)
