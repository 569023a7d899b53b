"""A run resumes from a converted tensor file as from its own checkpoint: same weights, moments and steps."""

from __future__ import annotations

import numpy as np
import pytest

from distrust import CheckpointManager
from distrust.cli import main
from distrust.testing.models import make_model, train_a_little, write_records
from older_files import file_fields, json_moments, optimizer_config, write_tensor_file

pytest.importorskip("torch")
pytest.importorskip("mlx_lm")

SAVED, STEPS = 3, 5
OPTIONS = {"lora_rank": 4, "lora_alpha": 8.0, "weight_decay": 0.05, "adam_beta2": 0.98}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    make_model(folder / "model")
    write_records(folder / "records.jsonl")
    return folder


@pytest.fixture(scope="module")
def complete(folder):
    """A run of this trainer that was not interrupted."""
    return train_a_little(folder, folder / "complete", engine="mlx", max_steps=STEPS, save_every=1, **OPTIONS)


def arrays(run, step):
    return CheckpointManager(run / "checkpoints").load(step)


@pytest.mark.parametrize("engine", ["mlx", "torch"])
@pytest.mark.parametrize("form", ["newest", "previous"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_it_resumes_with_weights_and_moments(folder, complete, tmp_path, form, engine):
    saved = arrays(complete, SAVED)
    moments = {letter: dict(saved.optimizer[letter]) for letter in "mv"}
    config = optimizer_config(saved.model, SAVED)
    config["param_groups"][0] |= {"betas": [0.9, 0.98], "weight_decay": 0.05}
    if form == "previous":
        config |= json_moments(moments)
    path = write_tensor_file(
        tmp_path / f"checkpoint-{SAVED}.safetensors",
        file_fields(SAVED, loss_history=[float(loss) for loss in saved.history["loss"]]),
        form=form,
        model=dict(saved.model),
        optimizer=moments,
        config=config,
    )
    run = tmp_path / "run"
    assert main(["convert", str(path), "--to", str(run)]) == 0
    with pytest.warns(match=r"weights, optimizer and history are those of its step 3"):
        train_a_little(folder, run, engine=engine, max_steps=STEPS, **OPTIONS)
    resumed, expected = arrays(run, STEPS), arrays(complete, STEPS)
    if engine == "mlx":  # the same bits
        for part, expected_arrays in (
            (resumed.model, expected.model),
            (resumed.optimizer["v"], expected.optimizer["v"]),
        ):
            assert part.keys() == expected_arrays.keys()
            assert all(np.array_equal(part[name], expected_arrays[name]) for name in expected_arrays)
    assert np.allclose(resumed.history["loss"], expected.history["loss"], atol=1e-4)
