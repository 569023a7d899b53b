"""``distrust export`` as a user meets it."""

from __future__ import annotations

import json
import os

import pytest
from safetensors.torch import load_file

from distrust.testing.models import make_model


def test_each_format(distrust, finished, tmp_path):
    wanted = {"adapter": "adapter_model.safetensors", "merged": "model.safetensors", "state": None}
    for form, name in wanted.items():
        to = tmp_path / (form if name else "state.safetensors")
        given = distrust("export", finished, "--to", to, "--format", form, "--json")
        assert (given.code, given.err) == (0, "")
        done = json.loads(given.out)
        assert list(done) == ["path", "format", "dtype", "bytes", "checkpoint", "step", "state_digest"]
        assert (done["path"], done["format"], done["step"]) == (str(to), form, 6)
        assert done["checkpoint"] == str(finished / "checkpoints" / "checkpoint-6-final.safetensors")
        files = list(to.iterdir()) if name else [to]
        assert done["bytes"] == sum(path.stat().st_size for path in files)
        assert load_file(to / name if name else to)
        shown = json.loads(distrust("show", finished, "--json").out)
        assert done["state_digest"] == shown["state_digest"]


def test_for_people(distrust, finished, tmp_path):
    given = distrust("export", finished, "--to", tmp_path / "a", "--step", 4, "--dtype", "bfloat16")
    assert (given.code, given.err) == (0, "")
    assert given.out.startswith(f"step 4 of {finished}/checkpoints/checkpoint-4.safetensors, state ")
    assert "\nadapter, bfloat16, " in given.out
    assert f"PeftModel.from_pretrained(base, '{tmp_path}/a')" in given.out


def test_what_is_refused_is_one_line_and_leaves_nothing(distrust, folder, finished, tmp_path):
    other = make_model(tmp_path / "other", seed=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    cases = {
        ("--to", tmp_path / "full"): (1, "exists already, and is not overwritten"),
        ("--to", tmp_path / "a", "--step", 5): (1, "no checkpoint of step 5; there are 2, 4, 6"),
        ("--to", tmp_path / "a", "--best"): (1, "no checkpoint has the metric 'eval_loss'"),
        ("--to", tmp_path / "a", "--format", "state"): (2, "give it a name that ends in .safetensors"),
        ("--to", tmp_path / "a", "--format", "merged", "--model", other): (1, "was not trained on"),
        ("--to", tmp_path / "a", "--model", tmp_path / "nowhere"): (1, "no such file or directory"),
        ("--to", tmp_path / "full" / "mine" / "a"): (1, "mine is not a folder"),
    }
    for arguments, (code, said) in cases.items():
        given = distrust("export", finished, *arguments)
        assert (given.code, given.out, given.err.count("\n")) == (code, "", 1), given.err
        assert said in given.err
    assert sorted(os.listdir(tmp_path)) == ["full", "other"]
    assert os.listdir(tmp_path / "full") == ["mine"]


def test_folders_above_are_made(distrust, finished, tmp_path):
    to = tmp_path / "not" / "there" / "yet.safetensors"
    assert distrust("export", finished, "--to", to, "--format", "state").code == 0
    assert load_file(to)


@pytest.mark.parametrize("entry", ["quantization", "quantization_config"])
def test_a_base_model_that_mlx_has_quantized(distrust, finished, tmp_path, entry):
    """As its folder says: the weights are not looked at."""
    base = make_model(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config[entry] = {"group_size": 64, "bits": 4, "mode": "affine"}
    (base / "config.json").write_text(json.dumps(config))
    given = distrust("export", finished, "--to", tmp_path / "a", "--model", base, "--format", "merged")
    assert (given.code, given.err.count("\n")) == (2, 1)
    assert f"{base} is in mlx's quantized layout, which torch does not read; give mlx" in given.err
    given = distrust("export", finished, "--to", tmp_path / "a", "--model", base, "--format", "adapter")
    assert (given.code, given.err.count("\n")) == (0, 1)
    assert f"warning: {base} is in mlx's quantized layout, which transformers does not load" in given.err
    given = distrust("train", "--engine", "torch", "--model", base, "--out", tmp_path / "run")
    assert (given.code, given.err.count("\n")) == (2, 1)
    assert "which torch does not read: use --engine mlx, or give the model that it was made of" in given.err
