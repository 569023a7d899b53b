"""Checkpoints in the older formats are listed, shown, verified and loaded, but never changed."""

from __future__ import annotations

import errno
import gc
import io
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from dataclasses import fields as fields_of
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from distrust import Checkpoint, CheckpointManager, TrainConfig
from distrust.cli import main
from distrust.config import key
from distrust.errors import (
    CheckpointError,
    CheckpointNotFound,
    CheckpointUnreadable,
    CorruptCheckpoint,
    DistrustWarning,
    NoIntactCheckpoint,
    SaveFailed,
)
from distrust.importers import safe_json
from distrust.ranks import SINGLE
from distrust.training import resume_point
from older_files import (
    FIELDS,
    A,
    B,
    arrays,
    equal,
    file_fields,
    moments,
    write_checksums,
    write_directory,
    write_tensor_file,
)

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "directory-checkpoints"
#: Several examples share a directory; each clears it first.
PROPERTY = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


def own_checkpoint(step):
    return Checkpoint(step=step, model={"w": np.full(3, step, np.float32)}, metrics={"eval_loss": 1.0 / step})


def read_output(capsys):
    captured = capsys.readouterr()
    return captured.out + captured.err


@pytest.fixture(params=["directory", "newest", "previous"])
def checkpoint(request, tmp_path):
    """A checkpoint of step 10 in each format."""
    if request.param == "directory":
        return write_directory(tmp_path / "checkpoint-10")
    return write_tensor_file(tmp_path / "checkpoint-10.safetensors", form=request.param)


def test_every_field_is_loaded(checkpoint, tmp_path):
    loaded = CheckpointManager(tmp_path).load(10)
    assert loaded.step == 10
    assert equal(loaded.model, arrays())
    scalars = {"step": 10} if checkpoint.is_file() else FIELDS["optimizer_scalars"]
    assert equal(loaded.optimizer, {**scalars, **moments()})
    assert equal(loaded.history, {"loss": np.array([2.5, 2.25])})
    assert equal(loaded.rng, {"seed": 7, "numpy": np.array([1, 2, 3], np.int64)})
    assert loaded.config["lora_rank"] == 2  # proven by the arrays; the config of the file says otherwise
    assert loaded.config.keys() <= {key(field.name) for field in fields_of(TrainConfig)}
    metadata = {**loaded.metadata}
    assert metadata.pop("foreign_fields", {}).keys() == ({"param_groups"} if checkpoint.is_file() else set())
    assert metadata == {**FIELDS["metadata"], "foreign_config": FIELDS["config"]}
    assert loaded.metrics == {"loss": 2.25}
    assert loaded.run["timestamp"] == FIELDS["timestamp"]
    assert loaded.run["imported_from"] == ("directory" if checkpoint.is_dir() else "tensor file")


def test_the_manager_reads_it(checkpoint, tmp_path):
    manager = CheckpointManager(tmp_path)
    assert manager.list_checkpoints() == [10]
    manager.validate(10)
    manager.validate(checkpoint)
    assert manager.load_latest().step == 10
    assert manager.load(checkpoint).step == 10
    file = manager.inspect(10)
    assert (file.step, file.kind, file.path) == (10, "periodic", checkpoint)
    assert file.metrics == {"best_loss": 1.25, "loss": 2.25}
    assert file.created == "2025-11-24T16:00:10.000+00:00"
    names = {tensor.name: (tensor.dtype, tensor.shape) for tensor in file.tensors}
    assert names[f"model.{A}"] == ("F32", (6, 2))
    assert names[f"optimizer.v.{B}"] == ("F32", (2, 3))
    with pytest.raises(CheckpointNotFound, match="eval_loss"):
        manager.load_best()
    assert CheckpointManager(tmp_path, metric="best_loss").load_best().step == 10


def test_the_commands_read_it(checkpoint, tmp_path, capsys):
    assert main(["ls", str(tmp_path)]) == 0
    assert "10  periodic" in read_output(capsys)
    assert main(["ls", str(checkpoint), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["step"], row["format"]) == (10, "directory" if checkpoint.is_dir() else "tensor file")
    assert main(["show", str(tmp_path), "--tensors"]) == 0
    assert f"model.{A}" in read_output(capsys)
    assert main(["verify", str(tmp_path)]) == 0
    assert f"{checkpoint}: ok" in read_output(capsys)
    assert main(["diff", str(checkpoint), str(checkpoint)]) == 1
    assert "convert" in read_output(capsys)
    assert main(["export", str(checkpoint), "--to", str(tmp_path / "x")]) == 1
    assert f"distrust convert {checkpoint}" in read_output(capsys)


def show(capsys, *arguments):
    assert main(["show", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_show_lists_the_tensors_that_conversion_writes(checkpoint, tmp_path, capsys):
    """The losses and the random state are in the metadata, and become arrays."""
    assert main(["convert", str(checkpoint), "--to", str(tmp_path / "to")]) == 0
    (path,) = (tmp_path / "to").rglob("*.safetensors")
    capsys.readouterr()
    original, converted = show(capsys, checkpoint), show(capsys, path)
    for section, count in (("model", 2), ("optimizer", 4), ("rng", 1), ("history", 1)):
        (line,) = (line for line in original.splitlines() if line.startswith(f"{section} "))
        assert line.split()[1:3] == [str(count), "tensors,"]
        assert line in converted.splitlines()
    listed, written = (
        {tensor.name: (tensor.dtype, tensor.shape, tensor.nbytes) for tensor in manager.inspect(file).tensors}
        for manager, file in ((CheckpointManager(tmp_path), checkpoint), (CheckpointManager(tmp_path), path))
    )
    assert listed == written


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text("ab.~", max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("ab.~", max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=25, **PROPERTY)
@given(JSON, st.lists(st.floats(allow_nan=False), max_size=3))
def test_what_is_listed_is_what_is_loaded(tmp_path, state, losses):
    shutil.rmtree(tmp_path)
    fields = {**FIELDS, "random_state": state, "loss_history": losses}
    path = write_directory(tmp_path / "checkpoint-10", fields)
    manager = CheckpointManager(tmp_path)
    listed = {tensor.name: (tensor.dtype, tensor.shape) for tensor in manager.inspect(path).tensors}
    with CheckpointManager(tmp_path / "to") as target:
        saved = target.inspect(target.save(manager.load(path)))
    assert listed == {tensor.name: (tensor.dtype, tensor.shape) for tensor in saved.tensors}


def test_no_line_is_longer_than_a_screen(tmp_path, capsys):
    numbers = {"best_loss": int("1234" * 1000), "low": -(10**3998), "tokens": 1234567, "text": "x" * 10**6}
    path = write_directory(tmp_path / "checkpoint-10", {**FIELDS, "metadata": numbers, "timestamp": None})
    assert main(["ls", str(tmp_path)]) == 0
    assert "best_loss 1.234e+3999  loss 2.250  low -1.000e+3998  tokens 1,234,567" in (
        output := read_output(capsys)
    )
    assert max(map(len, output.splitlines())) < 200
    output = show(capsys, path)
    assert "  best_loss: 1.234e+3999" in output
    assert "created" not in output
    assert "(1,000,000 characters; --json prints all)" in output
    assert max(map(len, output.splitlines())) < 1200


def test_show_reports_damage_as_verify_does(tmp_path, capsys):
    """A wrong checksum is a better explanation than an error of zipfile."""
    path = write_directory(tmp_path / "checkpoint-10")
    intact = (path / "model.npz").read_bytes()
    flipped = bytearray(intact)
    flipped[intact.index(b"NUMPY") + 20] ^= 1
    for raw in (b"something else", intact[:-30], bytes(flipped)):
        (path / "model.npz").write_bytes(raw)
        assert main(["show", str(path), "--tensors"]) == 1
        assert "model.npz does not match checksum.txt" in read_output(capsys)


def test_no_line_ends_with_spaces(checkpoint, capsys):
    lines = show(capsys, checkpoint, "--tensors").splitlines()
    assert [line for line in lines if line != line.rstrip()] == []


@pytest.mark.parametrize("name", ["metadata.json", "checksum.txt"])
def test_a_byte_order_mark_is_ignored(tmp_path, name):
    path = write_directory(tmp_path / "checkpoint-10")
    (path / name).write_bytes(b"\xef\xbb\xbf" + (path / name).read_bytes())
    if name == "metadata.json":
        write_checksums(path)  # of the changed bytes
    CheckpointManager(tmp_path).validate(10)
    assert equal(CheckpointManager(tmp_path).load(10).model, arrays())


def test_metadata_only(tmp_path, capsys):
    path = write_directory(tmp_path / "checkpoint-10-final", bare=True)
    manager = CheckpointManager(tmp_path)
    assert manager.list_checkpoints() == [10]
    loaded = manager.load(10)
    assert (loaded.model, equal(loaded.optimizer, FIELDS["optimizer_scalars"])) == ({}, True)
    assert main(["verify", str(path)]) == 0
    assert "no model and no optimizer" in read_output(capsys)


def at(step, best_loss, metadata=FIELDS["metadata"]):
    return {**FIELDS, "step": step, "metadata": {**metadata, "best_loss": best_loss}, "optimizer_scalars": {}}


@pytest.mark.parametrize("use", ["load_latest", "load_best"])
@pytest.mark.parametrize("damage", [False, True])
def test_metadata_only_is_skipped(tmp_path, use, damage):
    """A model of an earlier or worse step is better than none."""
    write_directory(tmp_path / "checkpoint-10", at(10, 0.5))
    newer = write_directory(tmp_path / "checkpoint-20", at(20, 0.25), bare=True)
    write_tensor_file(tmp_path / "checkpoint-30.safetensors", at(30, 0.125), model={}, optimizer={})
    manager = CheckpointManager(tmp_path, metric="best_loss")
    if damage:
        append(newer / "checksum.txt", "x")
    with pytest.warns(DistrustWarning) as caught:
        assert getattr(manager, use)().step == 10
    lines = sorted(str(one.message) for one in caught)
    without = f"skipped a checkpoint without a model, metadata only: {tmp_path / 'checkpoint-'}"
    if damage and use == "load_latest":  # a damaged one has no metric
        assert lines.pop().startswith(f"skipped a damaged checkpoint: {newer}: ")
    assert lines == [f"{without}30.safetensors"] if damage else [f"{without}20", f"{without}30.safetensors"]
    assert [manager.load(step).model for step in ([30] if damage else [20, 30])] == [{}] * (2 - damage)


@pytest.mark.parametrize("use", ["load_latest", "load_best", "choose"])
def test_nothing_but_metadata(tmp_path, use):
    for step in (10, 20):
        path = write_directory(tmp_path / f"checkpoint-{step}", at(step, 0.5), bare=True)
    manager = CheckpointManager(tmp_path, metric="best_loss")
    with pytest.raises(NoIntactCheckpoint, match=r"metadata only.* there are 10, 20$"):
        getattr(manager, use)()
    with pytest.raises(CheckpointError, match="metadata only: there is no model"):
        manager.choose(step=20)
    append(path / "checksum.txt", "x")
    with pytest.raises(NoIntactCheckpoint, match="checkpoint-10: contains no model"):
        manager.load_latest()


def test_a_step_means_the_checkpoint_with_a_model(tmp_path):
    write_directory(tmp_path / "checkpoint-10")
    write_directory(tmp_path / "checkpoint-10-final", bare=True)
    manager = CheckpointManager(tmp_path, metric="best_loss")
    assert equal(manager.load(10).model, arrays())
    assert equal(manager.load_best().model, arrays())


FINITE = {"allow_nan": False, "allow_infinity": False}
ARRAYS = st.sampled_from([np.dtype(np.float32), np.dtype(np.float16)]).flatmap(
    lambda dtype: hnp.arrays(
        dtype,
        hnp.array_shapes(min_dims=0, max_side=3, min_side=0),
        elements=hnp.from_dtype(dtype, **FINITE),
    )
)
STATES = st.dictionaries(st.text("abw.01_", min_size=1, max_size=8).map("model.".__add__), ARRAYS, max_size=3)


@settings(max_examples=15, **PROPERTY)
@given(STATES, st.lists(st.floats(allow_nan=False) | st.just(float("nan"))), st.booleans())
def test_a_written_state_is_read_back(tmp_path, model, losses, compressed):
    optimizer = moments(model) if model else {}
    fields = {**FIELDS, "loss_history": losses}
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    write_directory(
        tmp_path / "checkpoint-10", fields, model=model, optimizer=optimizer, compressed=compressed
    )
    loaded = CheckpointManager(tmp_path).load(tmp_path / "checkpoint-10")
    assert equal(loaded.model, model)
    assert equal(loaded.optimizer, {**FIELDS["optimizer_scalars"], **optimizer})
    assert equal(dict(loaded.history), {"loss": np.array(losses)} if losses else {})


def refusals(directory, *, model=None, optimizer=None):
    """The errors of loading and verifying the same checkpoint in each format."""
    model = arrays() if model is None else model
    optimizer = moments(model) if optimizer is None else optimizer
    paths = [
        write_directory(directory / "checkpoint-10", model=model, optimizer=optimizer),
        write_tensor_file(directory / "checkpoint-10.safetensors", model=model, optimizer=optimizer),
        write_tensor_file(
            directory / "checkpoint-11.safetensors",
            file_fields(11),
            model=model,
            optimizer=optimizer,
            form="previous",
        ),
    ]
    errors = []
    manager = CheckpointManager(directory)
    for path in paths:
        for use in (manager.load, manager.validate):
            with pytest.raises(CorruptCheckpoint) as error:
                use(path)
            assert error.value.path == path
            assert "\n" not in str(error.value)
            errors.append(error.value)
    return errors


def with_moment(moment, name, value):
    """The moments, with one of them replaced or removed."""
    group = moments()
    if value is None:
        del group[moment][name]
    else:
        group[moment][name] = np.asarray(value, np.float32)
    return group


@pytest.mark.parametrize(
    ("optimizer", "tensor", "reason"),
    [
        (
            with_moment("m", A, np.ones((2, 6))),
            f"m.{A}",
            f"m.{A} has shape [2, 6], but its weight has [6, 2]",
        ),
        (
            with_moment("v", A, np.ones((3, 4))),
            f"v.{A}",
            f"v.{A} has shape [3, 4], but its weight has [6, 2]",
        ),
        (with_moment("v", B, np.ones((1, 2, 3))), f"v.{B}", "[1, 2, 3], but its weight has [2, 3]"),
        (with_moment("v", B, None), f"m.{B}", f"m.{B} has no matching v"),
        (with_moment("m", B, None), f"v.{B}", f"v.{B} has no matching m"),
        ({"m": moments()["m"]}, f"m.{A}", f"m.{A} has no matching v"),
        ({"v": moments()["v"]}, f"v.{A}", f"v.{A} has no matching m"),
        (moments({**arrays(), "w": np.ones(2)}), "m.w", "m.w has no weight of that name in the model"),
    ],
)
def test_moments_must_match_the_model(tmp_path, optimizer, tensor, reason):
    for error in refusals(tmp_path, optimizer=optimizer):
        assert reason in error.reason
        assert error.tensor == f"optimizer.{tensor}"


@settings(max_examples=25, **PROPERTY)
@given(
    hnp.array_shapes(max_side=3),
    hnp.array_shapes(max_side=3),
    hnp.array_shapes(max_side=3),
    st.booleans(),
)
def test_shapes_must_agree(tmp_path, of_array, of_m, of_v, has_model):
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    model = {"w": np.ones(of_array, np.float32)} if has_model else {}
    optimizer = {"m": {"w": np.ones(of_m, np.float32)}, "v": {"w": np.ones(of_v, np.float32)}}
    if of_m == of_v and (of_m == of_array or not has_model):
        write_directory(tmp_path / "checkpoint-10", model=model, optimizer=optimizer)
        if has_model:  # a tensor file has moments only of its own tensors
            path = tmp_path / "checkpoint-10.safetensors"
            write_tensor_file(path, model=model, optimizer=optimizer)
        assert main(["verify", str(tmp_path)]) == 0
    else:
        refusals(tmp_path, model=model, optimizer=optimizer)


def test_moments_may_be_missing(tmp_path):
    one = {moment: {A: group[A]} for moment, group in moments().items()}
    for name, optimizer in (("one", one), ("none", {})):
        path = write_directory(tmp_path / name, optimizer=optimizer)
        assert equal(
            {**optimizer, **FIELDS["optimizer_scalars"]}, CheckpointManager(tmp_path).load(path).optimizer
        )


@pytest.mark.parametrize("step", ["x", 0, -5, 11, 99, 10.5, True, None, [10], 10**3000, float("nan")])
def test_the_step_of_moments_must_be_valid(tmp_path, step):
    scalars = {"optimizer_scalars": {"step": step, "learning_rate": 0.1}}
    path = write_directory(tmp_path / "checkpoint-10", {**FIELDS, **scalars})
    with pytest.raises(CorruptCheckpoint, match=r"optimizer_scalars\.step is ") as error:
        CheckpointManager(tmp_path).validate(path)
    assert len(error.value.reason) < 500


def test_valid_steps_of_moments(tmp_path):
    """At most the checkpoint's, none at all, or anything if there are no moments."""
    for step in range(1, 11):
        fields = {**FIELDS, "optimizer_scalars": {"step": step}}
        write_directory(tmp_path / str(step) / "checkpoint-10", fields)
    write_directory(tmp_path / "none" / "checkpoint-10", {**FIELDS, "optimizer_scalars": {}})
    write_directory(
        tmp_path / "bare" / "checkpoint-10", {**FIELDS, "optimizer_scalars": {"step": "x"}}, bare=True
    )
    for path in sorted(tmp_path.iterdir()):
        CheckpointManager(path).validate(10)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("section", ["model", "m", "v"])
@pytest.mark.parametrize("at", [0, -1])
def test_numbers_are_finite(tmp_path, number, section, at):
    model, optimizer = arrays(), moments()
    group = model if section == "model" else optimizer[section]
    group[B].reshape(-1)[at] = number
    for error in refusals(tmp_path, model=model, optimizer=optimizer):
        assert "holds numbers that are not finite" in error.reason
        assert B in error.reason


@settings(max_examples=30, **PROPERTY)
@given(st.data(), st.sampled_from(["<f2", "<f4", "<f8", "<c8", ">f2", ">f4", ">f8", ">c8"]))
def test_only_non_finite_numbers_are_refused(tmp_path, data, dtype):
    """The largest numbers are finite, and -0.0 is not negative."""
    dtype = np.dtype(dtype)
    largest = np.finfo(dtype).max
    numbers = hnp.from_dtype(dtype) | st.sampled_from([largest, -largest, np.nan, np.inf]).map(dtype.type)
    array = data.draw(hnp.arrays(dtype, 4, elements=numbers))
    squares = (
        np.abs(array)
        if dtype.kind == "c"
        else data.draw(st.sampled_from([array, np.abs(array), -np.zeros(4)]))
    )
    shutil.rmtree(tmp_path)
    path = write_directory(
        tmp_path / "checkpoint-10",
        model={"w": array},
        optimizer={"m": {"w": array}, "v": {"w": squares.astype(dtype)}},
    )
    if np.isfinite(array).all() and (dtype.kind == "c" or not (squares < 0).any()):
        CheckpointManager(tmp_path).validate(path)
    else:
        with pytest.raises(CorruptCheckpoint, match=r"not finite|negative"):
            CheckpointManager(tmp_path).validate(path)


def test_squares_are_not_negative(tmp_path):
    for error in refusals(tmp_path, optimizer=with_moment("v", B, -np.ones((2, 3)))):
        assert B in error.reason
        assert "negative" in error.reason


@pytest.fixture(scope="module")
def one_directory(tmp_path_factory):
    return write_directory(tmp_path_factory.mktemp("flipped") / "checkpoint-10")


@settings(max_examples=60, **PROPERTY)
@given(st.data())
def test_every_flipped_bit_of_the_folder_is_detected(one_directory, data):
    """In checksum.txt, too, except for spaces and the case of hexadecimal digits."""
    name = data.draw(st.sampled_from(["metadata.json", "model.npz", "optimizer.npz", "checksum.txt"]))
    path = one_directory / name
    valid = path.read_bytes()
    offset = data.draw(st.integers(0, len(valid) - 1))
    damaged = bytearray(valid)
    damaged[offset] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(damaged)
    try:
        with pytest.raises(CheckpointError) as caught:
            CheckpointManager(one_directory.parent).validate(one_directory)
        assert "\n" not in str(caught.value)
    except BaseException:
        if (
            name != "checksum.txt"
            or bytes(damaged).decode("latin-1").lower().split() != valid.decode().split()
        ):
            raise
    finally:
        path.write_bytes(valid)


def test_all_wrong_and_missing_files_are_named(tmp_path, capsys):
    path = write_directory(tmp_path / "checkpoint-10")
    expected = (path / "checksum.txt").read_text().split()[2]
    (path / "model.npz").write_bytes(b"something else")
    (path / "optimizer.npz").unlink()
    assert main(["verify", str(path)]) == 1
    assert "DAMAGED: optimizer.npz is missing" in read_output(capsys)
    write = (path / "checksum.txt").read_text().splitlines()
    (path / "checksum.txt").write_text("\n".join(line for line in write if "optimizer" not in line))
    assert main(["verify", str(path)]) == 1
    output = read_output(capsys)
    assert f"model.npz does not match checksum.txt: expected {expected}, found " in output


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda path: (path / "checksum.txt").unlink(), "checksum.txt is missing"),
        (lambda path: (path / "metadata.json").unlink(), "metadata.json is missing"),
        (
            lambda path: (path / "checksum.txt").write_text(
                "".join(
                    line
                    for line in (path / "checksum.txt").read_text().splitlines(keepends=True)
                    if "model" not in line
                )
            ),
            "model.npz is not in checksum.txt",
        ),
        (lambda path: append(path / "checksum.txt", f"{'0' * 64}  ../x\n"), "is not a plain file name"),
        (
            lambda path: append(path / "checksum.txt", f"{'0' * 64}  /etc/passwd\n"),
            "is not a plain file name",
        ),
        (lambda path: append(path / "checksum.txt", f"{'0' * 64}  gone.txt\n"), "gone.txt is missing"),
        (lambda path: append(path / "checksum.txt", "hello\n"), "line 4: not '<64 hex digits>  <file>'"),
        (lambda path: replace_file(path / "model.npz", os.mkfifo), "model.npz is not a regular file"),
        (lambda path: replace_file(path / "metadata.json", os.mkdir), "metadata.json is not a regular file"),
        (lambda path: replace_by_link(path / "model.npz"), "model.npz is a link"),
        (lambda path: replace_by_link(path / "checksum.txt"), "checksum.txt is a link"),
        (lambda path: path.rename(path.with_name("checkpoint-11")), "it holds step 10"),
    ],
)
def test_problems_with_the_files(tmp_path, change, reason, capsys):
    path = write_directory(tmp_path / "checkpoint-10")
    change(path)
    (path,) = tmp_path.glob("checkpoint-*")
    assert main(["verify", str(path)]) == 1
    output = read_output(capsys)
    assert reason in output
    assert output.count("\n") == 1
    assert main(["ls", str(tmp_path)]) == 0
    assert reason in read_output(capsys)
    with pytest.raises(NoIntactCheckpoint):
        CheckpointManager(tmp_path).load_latest()


def append(path, line):
    path.write_text(path.read_text() + line)


def replace_file(path, make):
    path.unlink()
    make(path)


def replace_by_link(path):
    path.symlink_to(path.rename(path.parent.parent / "elsewhere"))


def test_an_unlisted_file_causes_a_warning(tmp_path):
    path = write_directory(tmp_path / "checkpoint-10")
    (path / "notes.txt").write_text("mine")
    (path / ".DS_Store").write_text("the system's")
    with pytest.warns(DistrustWarning, match=r"notes\.txt is not in checksum\.txt") as caught:
        CheckpointManager(tmp_path).validate(10)
    assert len(caught) == 1


def npz(members):
    """A zip of these members."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zipped, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name that occurs twice
        for name, content, kind in members:
            zipped.writestr(zipfile.ZipInfo(name), content, compress_type=kind)
    return buffer.getvalue()


def npy(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


PLAIN = npy(np.zeros(4, np.float32))
STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([("w.npy", npy(np.array([{}], object), allow_pickle=True), STORED)], "never loaded"),
        ([("w.npy", npy(np.zeros(1, [("a", "f4")])), STORED)], "not a number that"),
        ([("w.npy", npy(np.array(["text"])), STORED)], "not a number that"),
        ([("w.npy", PLAIN.replace(b"(4,)", b"(5,)"), STORED)], "need 20 bytes, but it has 16"),
        ([("w.npy", PLAIN.replace(b"(4,)", b"(-4,"), STORED)], "header is not valid|not that of an array"),
        ([("w.npy", b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + PLAIN, STORED)], "2,147,483,647 bytes"),
        ([("w.npy", b"\x80\x04N.", STORED)], "not an array of numpy"),
        ([("w.npy", npy(np.zeros(30 << 20, np.uint8)), DEFLATED)], "would expand"),
        ([("../w.npy", PLAIN, STORED)], "named like a path"),
        ([("/w.npy", PLAIN, STORED)], "named like a path"),
        ([("a/w.npy", PLAIN, STORED)], "named like a path"),
        ([("w.pkl", PLAIN, STORED)], "not an .npy"),
        ([("w.npy", PLAIN, STORED)] * 2, "occurs twice"),
        ([("w.npy", PLAIN, zipfile.ZIP_LZMA)], "neither stored nor deflated"),
        ([("w.npy", npy(np.zeros(4, bool))[:-1] + b"\2", STORED)], "neither true nor false"),
    ],
)  # fmt: skip
def test_hostile_arrays_are_refused_and_named(tmp_path, content, reason):
    """Their checksums are right: an attacker can compute them."""
    path = write_directory(tmp_path / "checkpoint-10")
    (path / "model.npz").write_bytes(npz(content))
    write_checksums(path)
    for use in (CheckpointManager(tmp_path).load, CheckpointManager(tmp_path).validate):
        with pytest.raises(CorruptCheckpoint, match=reason) as caught:
            use(10)
        assert "model.npz" in str(caught.value)


def test_a_huge_sparse_file_costs_nothing(tmp_path):
    path = write_directory(tmp_path / "checkpoint-10")
    (path / "model.npz").unlink()
    with (path / "model.npz").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CorruptCheckpoint, match=r"model\.npz"):
        CheckpointManager(tmp_path).validate(10)


def test_encrypted_members_and_hidden_data(tmp_path):
    path = write_directory(tmp_path / "checkpoint-10")
    raw = bytearray(npz([("w.npy", PLAIN, STORED)]))
    raw[raw.index(b"PK\1\2") + 8] |= 1
    (path / "model.npz").write_bytes(raw)
    write_checksums(path)
    with pytest.raises(CorruptCheckpoint, match="encrypted"):
        CheckpointManager(tmp_path).load(10)
    (path / "model.npz").write_bytes(bytes(1 << 20) + npz([("w.npy", PLAIN, STORED)]))
    write_checksums(path)
    with pytest.raises(CorruptCheckpoint, match="its members hold"):
        CheckpointManager(tmp_path).load(10)


def test_arrays_of_other_layouts_are_read(tmp_path):
    model = {
        "fortran": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        "big": np.arange(3, dtype=">f8"),
        "complex": np.array([1 + 2j], dtype=">c8"),
        "flags": np.array([True, False]),
    }
    write_directory(tmp_path / "checkpoint-10", model=model, optimizer={})
    loaded = CheckpointManager(tmp_path).load(10).model
    for name, array in model.items():
        assert loaded[name].dtype == array.dtype.newbyteorder("<")
        assert np.array_equal(loaded[name], array)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "not valid JSON"),
        ('{"step":1,"config":' + '{"a":' * 95 + "1" + "}" * 96, "nested deeper"),
        ('{"step":10,"step":10}', "occurs twice"),
        ('{"step":' + "9" * 5000 + "}", "digits"),
        ('{"step":10.5}', "step is 10.5"),
        ('{"step":true}', "step is True"),
        ('{"step":10,"loss_history":[1,null]}', "not a list of numbers"),
        ('{"step":10,"loss_history":[1' + "0" * 400 + "]}", "too large for a float"),
        ('{"step":10,"metadata":[]}', "metadata is not an object"),
        ('{"step":10,"metadata":{"foreign_config":1}}', "two values of the name foreign_config"),
        ('{"step":10,"metadata":{"a":"\\ud800"}}', "lone surrogate"),
        ("null", "not a JSON object"),
        ("\xff", "not UTF-8"),
    ],
)
def test_hostile_metadata(tmp_path, text, reason):
    path = write_directory(tmp_path / "checkpoint-10", bare=True)
    (path / "metadata.json").write_bytes(text.encode("latin-1"))
    write_checksums(path)
    with pytest.raises(CorruptCheckpoint, match=reason):
        CheckpointManager(tmp_path).load(path)


@pytest.mark.parametrize(
    ("piece", "times"),
    [
        ("[" * 80 + "]" * 80 + ",", 2), ('{"":' * 80 + "1" + "}" * 80 + ",", 4), ('"\u0100",', 3),
        ("999,", 2),
    ],
)  # fmt: skip
def test_json_for_which_memory_does_not_suffice_is_not_parsed(monkeypatch, piece, times):
    """The estimate is never too low, and not many times too high."""
    monkeypatch.setattr(safe_json, "_UNCHECKED_BYTES", 1 << 17)
    raw = b'{"a":[' + piece.encode() * (140_000 // len(piece)) + b"1]}"
    gc.disable()  # it would traverse all lists again and again
    tracemalloc.start()
    try:
        safe_json.parse_object(raw, "it")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        gc.enable()
    monkeypatch.setattr(safe_json, "available_bytes", lambda: peak)
    with pytest.raises(CheckpointUnreadable, match="more memory than is free"):
        safe_json.parse_object(raw, "it")
    monkeypatch.setattr(safe_json, "available_bytes", lambda: times * peak)
    safe_json.parse_object(raw, "it")


@pytest.mark.parametrize("text", ['"\\ud800"', '{"\\udfff": 1}', '[1, {"a": ["\\ud83d"]}]'])
def test_lone_surrogates_are_detected_everywhere(tmp_path, text):
    path = write_directory(tmp_path / "checkpoint-10", bare=True)
    (path / "metadata.json").write_text('{"step": 10, "config": ["\\ud83d\\ude00", ' + text + "]}")
    write_checksums(path)
    with pytest.raises(CorruptCheckpoint, match="lone surrogate"):
        CheckpointManager(tmp_path).load(path)


def test_nan_and_infinity_in_the_history_are_preserved(tmp_path):
    write_directory(tmp_path / "checkpoint-10", {**FIELDS, "loss_history": [float("nan"), float("inf")]})
    assert equal(CheckpointManager(tmp_path).load(10).history["loss"], np.array([float("nan"), float("inf")]))


def test_our_format_wins_and_all_are_listed_in_order(tmp_path, capsys):
    write_directory(tmp_path / "checkpoint-10")
    write_directory(tmp_path / "checkpoint-30-final", {**FIELDS, "step": 30})
    with CheckpointManager(tmp_path, keep_last=None) as manager:
        for step in (10, 20):
            manager.save(own_checkpoint(step))
        assert manager.list_checkpoints() == [10, 20, 30]
        assert list(manager.load(10).model) == ["w"]
        assert manager.load_latest().step == 30
        assert manager.load_best().step == 20
    assert main(["ls", str(tmp_path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["step"], row["format"]) for row in rows] == [
        (10, "directory"), (10, "distrust"), (20, "distrust"), (30, "directory"),
    ]  # fmt: skip


def content(path):
    files = [path] if path.is_file() else sorted(path.iterdir())
    return {file.name: (file.read_bytes(), file.stat().st_ino) for file in files}


@pytest.mark.parametrize("damage", [False, True])
def test_no_rule_removes_or_counts_one(tmp_path, damage, capsys):
    """Neither retention, nor prune, nor prune --damaged; a newer one does not displace ours."""
    older = [
        write_directory(tmp_path / "checkpoint-10"),
        write_directory(tmp_path / "checkpoint-90", {**FIELDS, "step": 90}),
        write_tensor_file(tmp_path / "checkpoint-91.safetensors", file_fields(91)),
    ]
    if damage:
        append(older[0] / "metadata.json", "x")
        (older[1] / "model.npz").write_bytes(b"")
        raw = older[2].read_bytes()
        older[2].write_bytes(raw[:-5])
    original = [content(path) for path in older]
    with CheckpointManager(tmp_path, keep_last=2, keep_best=0) as manager:
        for step in (20, 30, 40):
            manager.save(own_checkpoint(step))
        assert [file.step for file in manager.scan().files] == [30, 40]
        manager.cleanup(keep_last=1)
        assert [file.step for file in manager.scan().files] == [40]
    assert main(["prune", str(tmp_path), "--damaged", "--keep-last", "1"]) == 0
    assert read_output(capsys).count("left: in an older format") == (3 if damage else 0)
    assert main(["prune", str(older[0]), "--keep-last", "1"]) == 2
    assert [content(path) for path in older] == original


def test_a_save_never_replaces_one(tmp_path):
    path = write_tensor_file(tmp_path / "checkpoint-10.safetensors")
    original = content(path)
    with CheckpointManager(tmp_path) as manager, pytest.raises(SaveFailed, match="never replaced"):
        manager.save(own_checkpoint(10))
    assert content(path) == original


def test_a_training_does_not_start_next_to_one(tmp_path):
    directory = tmp_path / "checkpoints"
    write_directory(directory / "checkpoint-10")
    config = TrainConfig(out=str(tmp_path))
    manager = CheckpointManager(directory)
    with pytest.raises(CheckpointError, match="distrust convert"):
        resume_point.require_startable(config, manager)
    with manager:
        manager.save(own_checkpoint(20))
    resume_point.require_startable(config, manager)
    engine = SimpleNamespace(framework="numpy", device_memory=lambda: None)
    resumed, file = resume_point.load_resume_point(config, manager, engine, SINGLE)
    assert (resumed.step, file.step) == (20, 20)


def test_a_branch_from_one_is_loaded_on_the_host_by_an_engine_on_a_device(tmp_path):
    write_directory(tmp_path / "run" / "checkpoints" / "checkpoint-10")
    config = TrainConfig(out=str(tmp_path / "run"), from_step=10, branch=str(tmp_path / "branch"))
    engine = SimpleNamespace(framework="torch", device_memory=lambda: None, device_for=lambda _: "cpu")
    manager = CheckpointManager(config.run_directory / "checkpoints")
    resumed, file = resume_point.load_resume_point(config, manager, engine, SINGLE)
    assert (resumed.step, file.step) == (10, 10)


def test_renamed_folders_and_folders_of_other_programs(tmp_path):
    moved = write_directory(tmp_path / "checkpoint-10").rename(tmp_path / "my-best")
    assert CheckpointManager(tmp_path).load(moved).step == 10
    for name in ("checkpoint-20/trainer_state.json", "checkpoint-30/adapter_model.bin", "checkpoint-40/a/b"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "checkpoint-50").write_text("a file")
    (tmp_path / "empty").mkdir()
    assert CheckpointManager(tmp_path).scan() == ((), (), ())


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.mkdir(), "an empty folder"),
        (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
        (lambda path: path.symlink_to("nowhere"), "a link to nothing"),
    ],
)
def test_a_name_without_a_checkpoint_is_reported(tmp_path, make, reason, capsys):
    write_directory(tmp_path / "checkpoint-10")
    make(tmp_path / "checkpoint-20")
    assert main(["ls", str(tmp_path)]) == 0
    assert f"{tmp_path / 'checkpoint-20'}: damaged: " in (output := read_output(capsys))
    assert reason in output
    assert main(["verify", str(tmp_path)]) == 1
    assert str(tmp_path / "checkpoint-20") in read_output(capsys)
    assert main(["prune", str(tmp_path), "--damaged"]) == 0
    assert os.path.lexists(tmp_path / "checkpoint-20")
    with pytest.warns(DistrustWarning, match=reason):
        assert CheckpointManager(tmp_path).load_latest().step == 10


#: Root without the capabilities that ignore permissions.
AS_ANYBODY = ["setpriv", *(f"--{of}=-dac_override,-dac_read_search" for of in ("inh-caps", "bounding-set"))]


#: Runs commands on a folder, and prints the code and the output of each.
COMMANDS = """
import contextlib, io, json, sys
from distrust.cli import main

def run(command, *options):
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        return main([command, sys.argv[1], *options]), output.getvalue()

print(json.dumps([run(*words) for words in json.loads(sys.argv[2])]))
"""


def unprivileged_prefix():
    """Words before a command so that it obeys permissions; None if that is impossible."""
    if os.geteuid() != 0:
        return []
    works = shutil.which("setpriv") and subprocess.run([*AS_ANYBODY, "true"], check=False).returncode == 0
    return AS_ANYBODY if works else None


@pytest.mark.parametrize("mode", [0o000, 0o400, 0o100])
def test_a_folder_that_cannot_be_entered_is_reported(tmp_path, mode):
    if (prefix := unprivileged_prefix()) is None:
        pytest.skip("root may read everything here")
    write_directory(tmp_path / "checkpoint-10")
    path = write_directory(tmp_path / "checkpoint-20", {**FIELDS, "step": 20})
    path.chmod(mode)
    commands = [["ls"], ["verify"], ["convert", "--to", str(tmp_path / "to")]]
    process = subprocess.run(
        [*prefix, sys.executable, "-c", COMMANDS, tmp_path, json.dumps(commands)],
        capture_output=True,
        text=True,
        check=True,
    )
    path.chmod(0o700)
    for code, output in json.loads(process.stdout):
        assert code == 1
        assert f"{path}: " in output
        assert "Permission denied" in output


def test_a_folder_that_cannot_be_read_is_reported(tmp_path, monkeypatch):
    """Whatever the reason: a network failure, too many open files."""
    path = write_directory(tmp_path / "checkpoint-20", {**FIELDS, "step": 20})
    real = os.listdir

    def listdir(folder=".", *arguments):
        if os.fspath(folder) == str(path):
            raise OSError(errno.EACCES, "Permission denied")
        return real(folder, *arguments)

    def deny(name, *arguments, _open=os.open, **options):
        if os.fspath(name) == str(path):
            raise OSError(errno.EACCES, "Permission denied")
        return _open(name, *arguments, **options)

    monkeypatch.setattr(os, "listdir", listdir)
    monkeypatch.setattr(os, "open", deny)
    manager = CheckpointManager(tmp_path)
    for use in (manager.scan, manager.load_latest, lambda: manager.validate(path)):
        with pytest.raises(CheckpointUnreadable, match="checkpoint-20: cannot be read: Permission denied"):
            use()


def test_listing_loads_no_numpy(run_python, tmp_path):
    write_directory(tmp_path / "checkpoint-10")
    write_tensor_file(tmp_path / "checkpoint-20.safetensors", file_fields(20))
    process = run_python(
        "import sys; from distrust.cli import main; assert main() == 0; print('numpy' in sys.modules)",
        "ls",
        tmp_path,
    )
    assert process.stdout.endswith("False\n"), process.stdout + process.stderr


def test_in_another_framework(tmp_path):
    torch = pytest.importorskip("torch")
    write_directory(tmp_path / "checkpoint-10")
    loaded = CheckpointManager(tmp_path).load(10, framework="torch", mmap=True, verify="lazy")
    assert torch.equal(loaded.model[A], torch.arange(12.0).reshape(6, 2))
    assert loaded.history["loss"].dtype == torch.float64


@pytest.mark.skipif(not REAL.exists(), reason="the shared checkpoints are not here")
def test_real_checkpoints(capsys):
    manager = CheckpointManager(REAL)
    assert manager.list_checkpoints() == [10, 20, 30]
    assert main(["verify", str(REAL)]) == 0
    assert read_output(capsys).count(": ok") == 3
    loaded = manager.load_latest()
    assert (len(loaded.model), len(loaded.optimizer["m"]), len(loaded.optimizer["v"])) == (8, 8, 8)
    assert loaded.config == {"lora_rank": 8}
    assert loaded.optimizer["step"] == 30
    for name, array in loaded.model.items():
        with np.load(REAL / "checkpoint-30-final" / "model.npz") as real:
            assert equal(array, real[name])
