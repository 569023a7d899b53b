"""``distrust export`` as a user meets it."""

from __future__ import annotations

import json
import os

import pytest
from safetensors.torch import load_file

from distrust.testing.models import make_model


def test_each_format(distrust, finished_run, tmp_path):
    weight_files = {"adapter": "adapter_model.safetensors", "merged": "model.safetensors", "state": None}
    for form, name in weight_files.items():
        to = tmp_path / (form if name else "state.safetensors")
        output = distrust("export", finished_run, "--to", to, "--format", form, "--json")
        assert (output.code, output.err) == (0, "")
        exported = json.loads(output.out)
        assert list(exported) == ["path", "format", "dtype", "bytes", "checkpoint", "step", "state_digest"]
        assert (exported["path"], exported["format"], exported["step"]) == (str(to), form, 6)
        assert exported["checkpoint"] == str(finished_run / "checkpoints" / "checkpoint-6-final.safetensors")
        files = list(to.iterdir()) if name else [to]
        assert exported["bytes"] == sum(path.stat().st_size for path in files)
        assert load_file(to / name if name else to)
        shown = json.loads(distrust("show", finished_run, "--json").out)
        assert exported["state_digest"] == shown["state_digest"]


def test_the_printed_summary(distrust, finished_run, tmp_path):
    output = distrust("export", finished_run, "--to", tmp_path / "a", "--step", 4, "--dtype", "bfloat16")
    assert (output.code, output.err) == (0, "")
    assert output.out.startswith(f"step 4 of {finished_run}/checkpoints/checkpoint-4.safetensors, state ")
    assert "\nadapter, bfloat16, " in output.out
    assert output.out.splitlines()[-1] == (
        f"for peft: base.generation_config = GenerationConfig.from_pretrained('{tmp_path}/a'); "
        f"PeftModel.from_pretrained(base, '{tmp_path}/a')"
    )
    assert (tmp_path / "a" / "generation_config.json").exists()


def test_a_refusal_is_one_line_and_leaves_nothing(distrust, folder, finished_run, tmp_path):
    other_model = make_model(tmp_path / "other", seed=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    cases = {
        ("--to", tmp_path / "full"): (1, "exists already, and is not overwritten"),
        ("--to", tmp_path / "a", "--step", 5): (1, "no checkpoint of step 5; there are 2, 4, 6"),
        ("--to", tmp_path / "a", "--best"): (1, "no checkpoint has the metric 'eval_loss'"),
        ("--to", tmp_path / "a", "--format", "state"): (2, "give it a name that ends in .safetensors"),
        ("--to", tmp_path / "a", "--format", "merged", "--model", other_model): (1, "was not trained on"),
        ("--to", tmp_path / "a", "--model", tmp_path / "nowhere"): (1, "no such file or directory"),
        ("--to", tmp_path / "full" / "mine" / "a"): (1, "mine is not a folder"),
    }
    for arguments, (code, message) in cases.items():
        output = distrust("export", finished_run, *arguments)
        assert (output.code, output.out, output.err.count("\n")) == (code, "", 1), output.err
        assert message in output.err
    assert sorted(os.listdir(tmp_path)) == ["full", "other"]
    assert os.listdir(tmp_path / "full") == ["mine"]


def test_parent_folders_are_created(distrust, finished_run, tmp_path):
    to = tmp_path / "not" / "there" / "yet.safetensors"
    assert distrust("export", finished_run, "--to", to, "--format", "state").code == 0
    assert load_file(to)


@pytest.mark.parametrize("entry", ["quantization", "quantization_config"])
def test_a_base_model_that_mlx_has_quantized(distrust, finished_run, tmp_path, entry):
    """As its folder says: the weights are not looked at."""
    base = make_model(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config[entry] = {"group_size": 64, "bits": 4, "mode": "affine"}
    (base / "config.json").write_text(json.dumps(config))
    output = distrust("export", finished_run, "--to", tmp_path / "a", "--model", base, "--format", "merged")
    assert (output.code, output.err.count("\n")) == (2, 1)
    assert f"{base} is in mlx's quantized layout, which torch does not read; give mlx" in output.err
    output = distrust("export", finished_run, "--to", tmp_path / "a", "--model", base, "--format", "adapter")
    assert (output.code, output.err.count("\n")) == (0, 1)
    assert f"warning: {base} is in mlx's quantized layout, which transformers does not load" in output.err
    output = distrust(
        "train", "--engine", "torch", "--model", base, "--data", "bundled", "--out", tmp_path / "r"
    )
    assert (output.code, output.err.count("\n")) == (2, 1)
    assert "which torch does not read: use --engine mlx, or give the model that it was made of" in output.err
