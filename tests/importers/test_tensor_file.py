"""The single-file format: its two forms are read with their moments, and everything else is refused."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distrust import CheckpointManager
from distrust.cli import main
from distrust.errors import CheckpointError, CorruptCheckpoint
from distrust.importers.convert import convert
from older_files import (
    FIELDS,
    A,
    B,
    Raw,
    arrays,
    equal,
    file_fields,
    json_moments,
    moments,
    optimizer_config,
    pack,
    write_tensor_file,
)

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "tensor-checkpoints"
FORMS = ("newest", "previous")
NAME = "checkpoint-10.safetensors"
PROPERTY = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


def refusal_of(path: Path) -> CorruptCheckpoint:
    """The error of loading and of verifying a file: they agree, in one line."""
    errors = []
    manager = CheckpointManager(path.parent)
    for use in (manager.load, manager.validate):
        with pytest.raises(CorruptCheckpoint) as error:
            use(path)
        errors.append(error.value)
    assert str(errors[0]) == str(errors[1])
    assert "\n" not in str(errors[0])
    return errors[0]


@pytest.mark.parametrize("form", FORMS)
def test_moments_are_not_counted_as_weights(tmp_path, form):
    path = write_tensor_file(tmp_path / NAME, form=form)
    loaded = CheckpointManager(tmp_path).load(path)
    assert equal(loaded.model, arrays())
    assert equal(loaded.optimizer, {"step": 10, **moments()})
    assert loaded.config == {
        "lora_rank": 2, "adam_beta1": 0.9, "adam_beta2": 0.99, "weight_decay": 0.01,
    }  # fmt: skip
    assert loaded.metadata["foreign_config"] == FIELDS["config"]
    assert loaded.metadata["foreign_fields"] == {
        "param_groups": optimizer_config(sorted(arrays()))["param_groups"]
    }
    assert "dropped" not in loaded.run
    labels = {tensor.name for tensor in CheckpointManager(tmp_path).inspect(path).tensors}
    assert {name for name in labels if name.startswith("model.")} == {f"model.{A}", f"model.{B}"}
    assert {name for name in labels if name.startswith("optimizer.")} == {
        f"optimizer.{moment}.{name}" for moment in "mv" for name in (A, B)
    }


def test_both_forms_of_a_state_are_the_same_state(tmp_path):
    states = [
        CheckpointManager(tmp_path).load(write_tensor_file(tmp_path / f"{form}.safetensors", form=form))
        for form in FORMS
    ]
    (newest, previous) = ((s.model, s.optimizer, s.config, s.metadata) for s in states)
    assert all(equal(a, b) for a, b in zip(newest, previous, strict=True))


@settings(max_examples=15, **PROPERTY)
@given(
    st.dictionaries(
        st.text("abw.01_", min_size=1, max_size=8).map("layers.".__add__),
        st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=4),
        max_size=3,
    ),
    st.sampled_from(FORMS),
)
def test_a_written_state_is_read_back(tmp_path, values, form):
    shutil.rmtree(tmp_path)
    model = {name: np.array(numbers, np.float32) for name, numbers in values.items()}
    squares = {name: np.abs(array) for name, array in model.items()}
    optimizer = {"m": model, "v": squares} if model else {}
    path = write_tensor_file(tmp_path / NAME, form=form, model=model, optimizer=optimizer)
    loaded = CheckpointManager(tmp_path).load(path)
    assert equal(loaded.model, model)
    assert equal({name: loaded.optimizer[name] for name in optimizer}, optimizer)


def test_without_an_optimizer_there_are_only_weights(tmp_path):
    path = write_tensor_file(tmp_path / NAME, optimizer={})
    assert CheckpointManager(tmp_path).load(path).optimizer == {}


@pytest.mark.parametrize("form", FORMS)
def test_before_the_first_step_there_are_no_moments(tmp_path, form):
    config = optimizer_config(arrays(), 0) | (json_moments({}) if form == "previous" else {})
    path = write_tensor_file(
        tmp_path / "checkpoint-0.safetensors", file_fields(0), form=form, optimizer={}, config=config
    )
    assert CheckpointManager(tmp_path).load(path).optimizer["m"] == {}
    config["step"] = 10
    path = write_tensor_file(tmp_path / NAME, form=form, optimizer={}, config=config)
    assert "no moments, but step is 10" in refusal_of(path).reason


GROUP = optimizer_config(arrays())["param_groups"][0]


def with_group(**changed):
    return optimizer_config([]) | {"param_groups": [{**GROUP, **changed}]}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (with_group(params=[A]), f"{B} has moments or is in param_groups, but not both"),
        (with_group(params=[A, B, B]), "a parameter occurs twice"),
        (with_group(params=[A, B, "w"]), "names w, of which there is no tensor"),
        (with_group(params="ab"), "not a list of groups"),
        (with_group(params=[A, 1]), "not a list of groups"),
        (with_group(lr=-1.0), "not a list of groups"),
        (with_group(lr=float("nan")), "not a list of groups"),
        (with_group(lr=10**400), "not a list of groups"),
        (with_group(lr=True), "not a list of groups"),
        (with_group(weight_decay="0"), "not a list of groups"),
        (with_group(betas=[0.9]), "not a list of groups"),
        (with_group(betas=[0.9, 1.0]), "not a list of groups"),
        (with_group(amsgrad=True), "not a list of groups"),
        (optimizer_config([]) | {"param_groups": {}}, "not a list of groups"),
        (optimizer_config([]) | {"param_groups": [[]]}, "not a list of groups"),
        (optimizer_config(arrays(), 11), "step is 11: with moments it must be an integer from 1 to 10"),
        (optimizer_config(arrays(), 0), "step is 0: with moments"),
        (optimizer_config(arrays(), 10.0), "step is 10.0: with moments"),
        (optimizer_config(arrays(), "x"), "step is 'x': with moments"),
        (optimizer_config(arrays(), state={}), "has the fields"),
        ({"step": 10}, "has the fields"),
    ],
)
def test_invalid_optimizer_configs_are_refused(tmp_path, form, config, reason):
    if form == "previous":
        config = json_moments(moments()) | config
    path = write_tensor_file(tmp_path / NAME, form=form, config=config)
    assert reason in refusal_of(path).reason


@pytest.mark.parametrize("config", [[], "text", None])
def test_json_that_is_not_an_object_is_refused(tmp_path, config):
    text = np.frombuffer(json.dumps(config).encode(), np.uint8)
    path = write_tensor_file(tmp_path / NAME, optimizer={}, extra={"_optimizer_config": text})
    assert "_optimizer_config is not a JSON object" in refusal_of(path).reason


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([[1.0] * 12], "not a pair"),
        ([[1.0] * 12, [6, 2], "x"], "not a pair"),
        ([1.0] * 12, "not a pair"),
        ([[[1.0, 2.0]] * 6, [6, 2]], "not a pair"),
        ({"shape": [6, 2], "data": [1.0] * 12}, "not a pair"),
        ([["x"] * 12, [6, 2]], "not a pair"),
        ([[True] * 12, [6, 2]], "not a pair"),
        ([[1.0] * 12, [6, -2]], "not a pair"),
        ([[1.0] * 12, [6, 2.0]], "not a pair"),
        ([[1.0] * 11, [6, 2]], "has 11 numbers, but the shape [6, 2]"),
        ([[1.0] * 12, [2, 6]], "has shape [2, 6], but its weight has [6, 2]"),
        ([[float("nan")] * 12, [6, 2]], "not finite"),
        ([[3.5e38] * 12, [6, 2]], "not finite"),
        ([[10**400] * 12, [6, 2]], "not finite"),
        ([[-1e-30] * 12, [6, 2]], "negative"),
    ],
)
def test_invalid_moments_of_the_previous_form_are_refused(tmp_path, value, reason):
    config = optimizer_config(arrays()) | json_moments(moments())
    config["exp_avg_sq"][A] = value
    path = write_tensor_file(tmp_path / NAME, form="previous", config=config)
    error = refusal_of(path)
    assert reason in error.reason
    assert error.tensor == f"optimizer.v.{A}"


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({f"optimizer.exp_avg.{A}": np.ones((6, 2), np.float16)}, "is F16; moments are F32"),
        ({"optimizer.exp_avg.w": np.ones(2, np.float32)}, "m.w has no weight of that name"),
        ({"optimizer.momentum.w": np.ones(2, np.float32)}, "is not part of this format"),
        ({"_scheduler": np.ones(2, np.uint8)}, "is not part of this format"),
        ({"_optimizer": np.ones(2, np.uint8)}, "both _optimizer_config and _optimizer"),
        ({"_optimizer_config": np.ones((2, 2), np.uint8)}, "not a uint8 vector"),
        ({"_optimizer_config": np.ones(2, np.int32)}, "not a uint8 vector"),
        ({"_metadata": np.ones(2, np.float32)}, "not a uint8 vector"),
    ],
)
def test_other_tensors_are_refused(tmp_path, extra, reason):
    assert reason in refusal_of(write_tensor_file(tmp_path / NAME, extra=extra)).reason


def test_moments_without_their_config_are_refused(tmp_path):
    extra = {f"optimizer.exp_avg.{A}": np.ones((6, 2), np.float32)}
    path = write_tensor_file(tmp_path / NAME, optimizer={}, extra=extra)
    assert "moments, but no tensor _optimizer_config" in refusal_of(path).reason


def test_scalars_of_the_directory_format_are_refused(tmp_path):
    path = write_tensor_file(tmp_path / NAME, FIELDS)
    assert "optimizer_scalars is not part of this format" in refusal_of(path).reason


@pytest.mark.parametrize(
    ("dtype", "valid", "invalid"),
    [
        ("BF16", "7f7f 7fff 0000", "807f"),
        ("BF16", "7fff", "c0ff"),
        ("F8_E4M3", "7e fe 80", "7f"),
        ("F8_E5M2", "7b fb 80", "fc"),
        ("F8_E5M2FNUZ", "7f ff", "80"),
        ("F32", "ffff7f7f ffff7fff", "0000c07f"),
    ],
)
def test_non_finite_weights_of_every_dtype_are_found(tmp_path, dtype, valid, invalid):
    width = len(bytes.fromhex(invalid))
    data = bytes.fromhex(valid)
    weights = Raw(dtype, (len(data) // width,), data)
    CheckpointManager(tmp_path).validate(
        write_tensor_file(tmp_path / "valid.safetensors", model={"w": weights}, optimizer={})
    )
    data += bytes.fromhex(invalid)
    weights = Raw(dtype, (len(data) // width,), data)
    path = write_tensor_file(tmp_path / "invalid.safetensors", model={"w": weights}, optimizer={})
    with pytest.raises(CorruptCheckpoint, match="tensor w: it holds numbers that are not finite"):
        CheckpointManager(tmp_path).validate(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda raw: raw[:-1], "the tensors end at"),
        (lambda raw: raw + b"x", "the tensors end at"),
        (lambda raw: raw.replace(b'"F32"', b'"F99"'), "not described"),
        (lambda raw: raw.replace(b'"step"', b'"step ', 1), "not valid JSON"),
    ],
)
def test_damaged_files_are_refused(tmp_path, change, reason):
    path = write_tensor_file(tmp_path / NAME)
    path.write_bytes(change(path.read_bytes()))
    assert reason in refusal_of(path).reason


def test_safetensors_files_of_other_programs_are_not_checkpoints(tmp_path):
    path = tmp_path / NAME
    path.write_bytes(pack(arrays()))
    with pytest.raises(CorruptCheckpoint, match="not a checkpoint of this library"):
        CheckpointManager(tmp_path).load(10)


@settings(max_examples=60, **PROPERTY)
@given(st.data(), st.sampled_from(FORMS))
def test_damage_is_refused_or_harmless(tmp_path, data, form):
    """Without checksums some flipped bits go unnoticed, but no number is infinite or NaN."""
    path = write_tensor_file(tmp_path / NAME, form=form)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(raw)
    loaded = None
    with contextlib.suppress(CheckpointError):
        loaded = CheckpointManager(tmp_path).load(path)
    assert loaded is None or all(np.isfinite(array).all() for array in loaded.model.values())


def test_options_that_no_option_expresses_are_reported(tmp_path, capsys):
    """Two groups with different betas, and vectors that are decayed."""
    model = {**arrays(), "norm": np.ones(3, np.float32)}
    groups = [
        {**GROUP, "params": [A, B]},
        {**GROUP, "params": ["norm"], "betas": [0.8, 0.9], "lr": 0.1},
    ]
    path = write_tensor_file(tmp_path / NAME, model=model, config={"param_groups": groups, "step": 10})
    loaded = CheckpointManager(tmp_path).load(path)
    assert loaded.config == {"lora_rank": 2, "weight_decay": 0.01}
    assert main(["convert", str(path), "--to", str(tmp_path / "run")]) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert "dropped: the betas, which differ between parameter groups" in line
    assert "dropped: the weight decay of vectors" in line


@pytest.mark.skipif(not REAL.exists(), reason="the shared checkpoints are not available")
def test_real_files(tmp_path, capsys):
    manager = CheckpointManager(REAL)
    assert manager.list_checkpoints() == [20, 40, 60]
    assert main(["verify", str(REAL)]) == 0
    assert capsys.readouterr().out.count(": ok") == 3
    for step in (20, 40, 60):
        loaded = manager.load(step)
        assert len(loaded.model) == len(loaded.optimizer["m"]) == len(loaded.optimizer["v"]) == 4
        assert {name: array.shape for name, array in loaded.model.items()} == {
            name: array.shape for name, array in loaded.optimizer["v"].items()
        }
        assert (loaded.optimizer["step"], loaded.config["lora_rank"]) == (step, 4)
        assert len(loaded.history["loss"]) == step
        tensors = manager.inspect(step).tensors
        assert sum(tensor.name.startswith("model.") for tensor in tensors) == 4
    assert [result.outcome for result in convert(REAL, tmp_path)] == ["converted"] * 3
    converted = CheckpointManager(tmp_path / "checkpoints").load(60)
    original = manager.load(60)
    assert equal(converted.optimizer, original.optimizer)
    assert equal(converted.model, original.model)
