"""Clipping does not undo the weights: the maximum norm scales with the mean weight of the step."""

from __future__ import annotations

import numpy as np
import pytest

from distrust import CheckpointManager
from distrust.data import IGNORED
from distrust.errors import ResumeRefused
from distrust.testing.toy_engine import ToyEngine


class Clipped(ToyEngine):
    """Records the maximum norm and the mean weight of each step."""

    def __init__(self):
        super().__init__(dropout=0.0)
        self.bounds, self.means, self.padded_means, self._step = [], [], [], []

    def micro_step(self, batch, *, tokens):
        self._step.append(batch)
        return super().micro_step(batch, tokens=tokens)

    def clip_gradients(self, max_norm):
        weights = np.concatenate([batch.weights[batch.labels != IGNORED] for batch in self._step])
        self.means.append(weights.mean(dtype=np.float64))
        padded = [batch.pad(batch.weights, filler=0) for batch in self._step]
        self.padded_means.append(float(sum(rows.sum() for rows in padded) / len(weights)))
        self.bounds.append(max_norm)
        self._step = []
        return super().clip_gradients(max_norm)


def test_norm_is_scaled_by_the_mean_weight(run, tmp_path):
    engine = Clipped()
    run(tmp_path, engine=engine, max_grad_norm=0.01)
    assert engine.bounds == pytest.approx([0.01 * mean for mean in engine.means])
    assert max(engine.bounds) > 1.2 * min(engine.bounds)


def test_the_last_bits_are_those_of_padded_rows(run, tmp_path):
    """As in the first version, whose batches were padded: its runs go on with the same bits."""
    engine = Clipped()
    run(tmp_path, engine=engine, max_grad_norm=0.01, batch_size=11, max_steps=20)
    assert engine.bounds == [0.01 * mean for mean in engine.padded_means]


@pytest.mark.parametrize("options", [{"clipping": "plain"}, {"weighting": "off"}, {"lambda_": 0.0}])
def test_plain_clipping_and_equal_weights_use_the_norm(run, tmp_path, options):
    engine = Clipped()
    run(tmp_path, engine=engine, max_grad_norm=0.01, **options)
    assert set(engine.bounds) == {0.01}


def test_zero_norm_disables_clipping(run, tmp_path):
    engine = Clipped()
    run(tmp_path, engine=engine, max_grad_norm=0.0)
    assert set(engine.bounds) == {0.0}


def test_run_older_than_the_option_uses_plain_clipping(run, tmp_path, monkeypatch):
    config = CheckpointManager.save_async

    def without_the_option(manager, checkpoint, **options):
        checkpoint.config.pop("clipping")
        return config(manager, checkpoint, **options)

    monkeypatch.setattr(CheckpointManager, "save_async", without_the_option)
    run(tmp_path, stop_after=3, clipping="plain")
    with pytest.raises(ResumeRefused, match="--clipping was plain, is weighted"):
        run(tmp_path)
    ended, _ = run(tmp_path, clipping="plain")
    assert ended.finished
