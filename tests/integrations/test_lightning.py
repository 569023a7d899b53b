"""Checkpoints inside Lightning's Trainer and Fabric: runs that are killed, failed writes, refusals.

What Lightning itself loses is asserted, too, so that docs/integrations.md stays true.
"""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("lightning", minversion="2.6")
pytest.importorskip("torchdata")

import lightning
import torch
from lightning_runs import BATCHES, IMPORTS, PROGRAM, RECORDS, Model, Run, loader, trainer

from campaigns.session import Forks, Session
from distrust import CheckpointManager, load_file, save_file, verify_file
from distrust.checkpoint import Checkpoint
from distrust.checkpoint.disk import Disk
from distrust.errors import (
    ConfigError,
    CorruptCheckpoint,
    DistrustWarning,
    NoIntactCheckpoint,
    SaveFailed,
    UnsupportedState,
)
from distrust.integrations.lightning import DistrustCheckpointIO, DistrustModelCheckpoint, RandomState
from distrust.integrations.random import generators, set_generators

pytestmark = [
    pytest.mark.usefixtures("no_fsync"),
    # Lightning's own: it would like more workers, and an empty folder.
    pytest.mark.filterwarnings("ignore::UserWarning:lightning.*"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`:UserWarning"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]

# Runs that are killed


@pytest.fixture(scope="module")
def forks(forked_python) -> Iterator[Forks]:
    with Forks(PROGRAM, IMPORTS, name="a fork", python=[forked_python]) as forks:
        yield forks


Start = Callable[..., None]


@pytest.fixture(scope="module")
def start(forks) -> Start:
    """Runs a process until it ends, or kills itself in its batch ``kill_at``."""

    def start(folder: Path, run: Run, *, kill_at: int | None = None, **options: bool) -> None:
        folder.mkdir(exist_ok=True)
        order = {"run": asdict(run), "kill_at": kill_at, "settles": False, "is_plain": False, **options}
        session = Session(forks, [str(folder), json.dumps(order)], folder=folder, directory=folder)
        assert session.wait() == (0 if kill_at is None else -9), session.errors()

    return start


def end_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "end.json").read_text())


def batches_by_process(folder: Path) -> list[list[tuple[int, ...]]]:
    processes: dict[int, list[tuple[int, ...]]] = {}
    for line in (folder / "batches.jsonl").read_text().splitlines():
        pid, *indices = json.loads(line)
        processes.setdefault(pid, []).append(tuple(indices))
    return [*processes.values()]


def disturb(
    start: Start, folder: Path, run: Run, *, kills: Sequence[int], settles: bool = False
) -> dict[str, Any]:
    for kill_at in (*kills, None):
        start(folder, run, kill_at=kill_at, settles=settles)
    return end_of(folder)


EXACT = {
    "stateful": Run(),
    "stateful, 2 workers, accumulation, validation": Run(workers=2, accumulate=2, validate=True),
    "stateful, random data": Run(random_data=True),
    "a loader that draws from the global generator": Run(loader="drawing"),
    "plain, 2 workers, random data, at an epoch's end": Run(
        loader="plain", every=None, workers=2, random_data=True
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_a_killed_run_ends_as_an_undisturbed_one_without_us(start, tmp_path, name):
    run = EXACT[name]
    start(tmp_path / "plain", run, is_plain=True)
    # Its one save before the kill would else race with it.
    end = disturb(start, tmp_path / "killed", run, kills=(16, 9), settles=run.every is None)
    assert end == end_of(tmp_path / "plain")
    assert len(batches_by_process(tmp_path / "killed")[-1]) < BATCHES * run.epochs - 5, "it did resume"


# What Lightning 2.6.6 itself does; docs/integrations.md says so. A later version may do better: then this
# fails, and the docs are to be changed.


def test_lightning_begins_an_epoch_of_a_plain_loader_again(start, tmp_path):
    end = disturb(start, tmp_path, Run(loader="plain"), kills=(18,), settles=True)
    first, second = batches_by_process(tmp_path)
    assert end["steps"] == 3 * BATCHES == 15 + len(second), "it went on after step 15"
    epoch = [*first[BATCHES:15], *second[: 2 * BATCHES - 15]]
    assert len({index for batch in epoch for index in batch}) < RECORDS, "some records twice, others never"


def test_lightning_loses_an_epoch_of_a_stateful_loader_saved_on_its_last_batch(start, tmp_path):
    end = disturb(start, tmp_path, Run(every=BATCHES), kills=(16,), settles=True)
    assert end["steps"] == 2 * BATCHES, "of three epochs"


def test_lightning_repeats_the_order_of_a_stateful_loader_saved_at_an_epochs_end(start, tmp_path):
    end = disturb(start, tmp_path, Run(every=None), kills=(16,), settles=True)
    first, second = batches_by_process(tmp_path)
    assert second[:BATCHES] == first[:BATCHES], "epoch 2 has the order of epoch 1"
    assert end["steps"] == 3 * BATCHES


def test_lightning_adds_an_epoch_to_a_plain_loader_saved_on_its_last_batch(start, tmp_path):
    run = Run(loader="plain", every=BATCHES, epochs=4)
    assert disturb(start, tmp_path, run, kills=(16, 16), settles=True)["steps"] == 5 * BATCHES


def test_lightning_loses_a_batch_of_a_stream(start, tmp_path):
    end = disturb(start, tmp_path, Run(streamed=True), kills=(8,), settles=True)
    assert end["steps"] == 3 * BATCHES - 1


def test_workers_of_a_stateful_loader_draw_other_random_numbers_after_a_resume(start, tmp_path):
    run = Run(random_data=True, workers=2)
    start(tmp_path / "plain", run, is_plain=True)
    end = disturb(start, tmp_path / "killed", run, kills=(16,), settles=True)
    (batches,), (_, second) = (batches_by_process(tmp_path / name) for name in ("plain", "killed"))
    assert second == batches[15:], "the same records in the same order"
    assert end["digest"] != end_of(tmp_path / "plain")["digest"]


# A file is removed only when the one that replaces it is durable


STATE = {"state_dict": {"w": torch.arange(6.0)}, "global_step": 1}


@pytest.fixture
def fail_saves(monkeypatch) -> Callable[[Callable[[Path], bool]], None]:
    """Makes the disk full for the files that it is asked for."""

    def fail_saves(is_full: Callable[[Path], bool]) -> None:
        create = Disk.create

        def create_or_fail(self: Disk, path: Path) -> int:
            if is_full(path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return create(self, path)

        monkeypatch.setattr(Disk, "create", create_or_fail)

    return fail_saves


def test_a_replaced_file_goes_when_the_next_one_is_durable(tmp_path):
    io = DistrustCheckpointIO()
    io.save_checkpoint(STATE, tmp_path / "a.safetensors")
    io.save_checkpoint(STATE, tmp_path / "b.safetensors")
    io.remove_checkpoint(tmp_path / "a.safetensors")
    io.teardown()
    assert [path.name for path in tmp_path.iterdir()] == ["b.safetensors"]


def test_it_goes_in_the_background(tmp_path):
    """Not at the next save: a kill before it would leave the file forever."""
    io = DistrustCheckpointIO()
    io.save_checkpoint(STATE, tmp_path / "a.safetensors")
    io.save_checkpoint(STATE, tmp_path / "b.safetensors")
    io.remove_checkpoint(tmp_path / "a.safetensors")
    end = time.monotonic() + 10
    while (tmp_path / "a.safetensors").exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    io.teardown()


def test_what_cannot_be_removed_is_said_and_the_others_go(tmp_path):
    io = DistrustCheckpointIO()
    io.save_checkpoint(STATE, tmp_path / "a")
    io.wait()
    (tmp_path / "folder").mkdir()
    io._replaced.append(tmp_path / "folder")
    with pytest.warns(DistrustWarning, match=r"^\S+/folder: cannot be removed: [^\n]+$"):
        io.remove_checkpoint(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_failed_save_leaves_what_it_was_to_replace(tmp_path, fail_saves):
    io = DistrustCheckpointIO()
    io.save_checkpoint(STATE, tmp_path / "a.safetensors")
    io.wait()
    fail_saves(lambda path: "b.safetensors" in path.name)
    io.save_checkpoint(STATE, tmp_path / "b.safetensors")
    io.remove_checkpoint(tmp_path / "a.safetensors")
    with pytest.raises(SaveFailed, match=r"b\.safetensors: not saved: No space left"):
        io.save_checkpoint(STATE, tmp_path / "c.safetensors")
    io.teardown()  # raised once
    verify_file(tmp_path / "a.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_kill_beside_the_write_leaves_what_it_was_to_replace(forks, tmp_path):
    session = Session(forks, [str(tmp_path), "{}"], folder=tmp_path, directory=tmp_path)
    assert session.wait() == -9, session.errors()
    assert load_file(tmp_path / "first.safetensors").step == 1
    assert not (tmp_path / "second.safetensors").exists()


def fit(folder: Path, run: Run, *, callbacks: Sequence[Any] = (), **options: Any) -> Any:
    """A run of this process; returns its trainer."""
    saving = options.pop("saving", {"every_n_train_steps": run.every})
    checkpoints = DistrustModelCheckpoint(folder / "checkpoints", **saving)
    parts = {"plugins": [DistrustCheckpointIO()], "callbacks": [*callbacks, checkpoints]}
    fitting = trainer(folder=folder, **{"max_steps": 12, "num_sanity_val_steps": 0, **parts, **options})
    validation = torch.utils.data.DataLoader(loader(run).dataset, batch_size=8) if run.validate else None
    fitting.fit(Model(folder), loader(run), validation, ckpt_path="last")
    return fitting


@pytest.mark.parametrize("step", [5, 10])
def test_a_failed_save_ends_the_training_at_the_next_save_or_at_the_end(tmp_path, fail_saves, step):
    fail_saves(lambda path: f"checkpoint-{step}" in path.name)
    with pytest.raises(SaveFailed, match=rf"checkpoint-{step}\.safetensors: not saved: No space left"):
        fit(tmp_path, Run())
    steps = CheckpointManager(tmp_path / "checkpoints").list_checkpoints()
    assert steps == ([] if step == 5 else [5]), "the one before stays"


# Names, and what is read from them


def test_the_folder_is_one_of_checkpoints_with_metrics(tmp_path):
    fitting = fit(
        tmp_path,
        Run(validate=True),
        max_steps=22,
        saving={"monitor": "val_loss", "save_top_k": 2, "every_n_epochs": 1},
        max_epochs=4,
    )
    manager = CheckpointManager(tmp_path / "checkpoints", metric="val_loss")
    contents = manager.scan()
    assert [file.step for file in contents.all_intact] == [11, 22]
    assert not contents.damaged
    best = manager.load_best(framework="torch")
    path = Path(fitting.checkpoint_callback.best_model_path)
    assert path.name == f"checkpoint-{best.step}.safetensors"
    assert best.metrics["val_loss"] == fitting.checkpoint_callback.best_model_score.item()
    model = Model(tmp_path)
    fitting.validate(model, loader(Run()), ckpt_path="best", verbose=False)
    assert all(torch.equal(model.state_dict()[name], best.model[name]) for name in best.model)


def test_the_last_one_is_the_newest_that_verifies(tmp_path):
    folder = tmp_path / "checkpoints"
    fit(tmp_path, Run(), saving={"every_n_train_steps": 4, "save_top_k": -1, "save_last": True})
    names = [f"checkpoint-{step}.safetensors" for step in (4, 8, 12)]
    assert sorted(path.name for path in folder.iterdir()) == [*sorted(names), "last.safetensors"]
    find = DistrustModelCheckpoint(folder)._find_last_checkpoints
    assert find(None) == {str(folder / "last.safetensors")}
    damaged = []
    for name, newest in (("last.safetensors", names[2]), (names[2], names[1]), (names[1], names[0])):
        path = folder / name
        path.write_bytes(path.read_bytes()[:-1])
        damaged.append(f"skipped a checkpoint: {path}: .*")
        with pytest.warns(DistrustWarning) as warned:
            assert find(None) == {str(folder / newest)}
        (warning,) = warned
        assert len(str(warning.message).splitlines()) == len(damaged)
        assert re.fullmatch("\n".join(sorted(damaged)), "\n".join(sorted(str(warning.message).splitlines())))
    (folder / names[0]).write_bytes(b"")
    with pytest.raises(NoIntactCheckpoint, match="none is intact: move them away to start over"):
        find(None)
    assert DistrustModelCheckpoint(tmp_path / "empty")._find_last_checkpoints(None) == set()


def test_the_last_one_is_by_step_and_not_by_the_time_of_the_file(tmp_path):
    """A copy of a folder has any times."""
    io = DistrustCheckpointIO()
    for step in (12, 4, 8):
        io.save_checkpoint({"global_step": step}, tmp_path / f"{step}.safetensors")
    io.wait()
    find = DistrustModelCheckpoint(tmp_path)._find_last_checkpoints
    assert find(None) == {str(tmp_path / "12.safetensors")}


def test_what_is_no_checkpoint_of_lightning_is_skipped(tmp_path):
    io = DistrustCheckpointIO()
    io.save_checkpoint(STATE, tmp_path / "checkpoint-1.safetensors")
    io.wait()
    (tmp_path / "link.safetensors").symlink_to("nothing")
    (tmp_path / "folder.safetensors").mkdir()
    save_file(tmp_path / "other.safetensors", Checkpoint(step=2))
    with pytest.warns(DistrustWarning) as warned:
        last = DistrustModelCheckpoint(tmp_path)._find_last_checkpoints(None)
    assert last == {str(tmp_path / "checkpoint-1.safetensors")}
    lines = sorted(str(warned[0].message).splitlines())
    assert lines == [
        f"skipped a checkpoint: {tmp_path}/folder.safetensors: not a regular file",
        f"skipped a checkpoint: {tmp_path}/link.safetensors: no such checkpoint",
        f"skipped a checkpoint: {tmp_path}/other.safetensors: another program wrote it",
    ]


def test_a_file_that_another_process_removes_is_no_error(tmp_path, monkeypatch):
    glob = Path.glob
    vanished = tmp_path / "vanished.safetensors"
    monkeypatch.setattr(Path, "glob", lambda *arguments: [vanished, *glob(*arguments)])
    assert DistrustModelCheckpoint(tmp_path)._find_last_checkpoints(None) == set()


def test_two_callbacks_in_one_folder_need_different_names(tmp_path):
    folder = tmp_path / "checkpoints"
    best = {"monitor": "val_loss", "save_top_k": 1, "every_n_epochs": 1}
    same = DistrustModelCheckpoint(folder, **best)
    with pytest.raises(
        ConfigError, match=r'^\S+/checkpoints: two callbacks save .*: give one filename="best-'
    ):
        fit(tmp_path, Run(validate=True), callbacks=[same])
    assert not folder.exists()
    best_saver = DistrustModelCheckpoint(folder, filename="best-{step}", **best)
    fit(tmp_path, Run(validate=True), callbacks=[best_saver], max_steps=22)
    assert sorted(path.name for path in folder.iterdir()) == [
        Path(best_saver.best_model_path).name,
        "checkpoint-20.safetensors",
    ]


# Values


SCALARS = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text()
TENSORS = st.lists(st.floats(width=32, allow_nan=False)).map(torch.tensor)
KEYS = st.text() | st.integers(-9, 9)
TREES = st.recursive(
    SCALARS | TENSORS,
    lambda values: st.lists(values) | st.tuples(values) | st.dictionaries(KEYS, values),
    max_leaves=8,
)


def equal(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and torch.equal(one, two) and one.dtype == two.dtype
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(two) and len(one) == len(two) and all(map(equal, one, two))
    return type(one) is type(two) and one == two


@settings(max_examples=30)
@given(
    st.dictionaries(st.text(), TREES),
    st.dictionaries(st.text(), TENSORS) | TREES,
    st.lists(TREES) | st.none(),
    TREES | st.sampled_from([10**18, -1]),
)
def test_what_lightning_saves_comes_back(tmp_path_factory, values, weights, optimizers, step):
    state = {**values, "step": step, "distrust_generators": {}}
    state |= {} if weights is None else {"state_dict": weights}  # with Fabric, it may be anything
    state |= {} if optimizers is None else {"optimizer_states": optimizers, "lr_schedulers": []}
    path = tmp_path_factory.mktemp("state") / "any name.ckpt"
    io = DistrustCheckpointIO()
    io.save_checkpoint(state, path)
    assert equal(io.load_checkpoint(path, map_location="cpu", weights_only=True), state)


@pytest.mark.parametrize("value", [Path("x"), {1, 2}, torch.float32, len], ids=str)
def test_what_is_no_plain_data_is_refused_with_its_place(tmp_path, value):
    with pytest.raises(UnsupportedState, match=r"history\.lightning\.hyper_parameters\.p: a"):
        DistrustCheckpointIO().save_checkpoint({"hyper_parameters": {"p": value}}, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_fabric_goes_on_where_it_was(tmp_path):
    def train(*, begin: int, end: int) -> list[Any]:
        lightning.seed_everything(0, verbose=False)
        io = DistrustCheckpointIO()
        fabric = lightning.Fabric(accelerator="cpu", devices=1, plugins=[io])
        net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.5))
        model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), lr=0.1))
        state = {"model": model, "optimizer": optimizer, "step": 0, "rng": generators()}
        if begin:
            fabric.load(tmp_path / "state.safetensors", state)
            set_generators(state["rng"])
        for step in range(state["step"], end):
            fabric.backward(model(torch.randn(2, 3)).square().sum())
            optimizer.step()
            optimizer.zero_grad()
            fabric.save(tmp_path / "state.safetensors", {**state, "step": step + 1, "rng": generators()})
        io.wait()
        assert load_file(tmp_path / "state.safetensors").step == end
        return [*net.state_dict().values(), torch.get_rng_state()]

    end = train(begin=0, end=7)
    train(begin=0, end=3)
    assert equal(train(begin=3, end=7), end)


# Refusals


def test_what_is_not_supported_is_refused(tmp_path):
    io = DistrustCheckpointIO()
    for arguments in ({"path": "s3://bucket/x"}, {"path": tmp_path / "x", "storage_options": {}}):
        with pytest.raises(ConfigError, match="only local files are supported, without storage_options"):
            io.save_checkpoint(STATE, **arguments)
    io.save_checkpoint(STATE, tmp_path / "x")
    with pytest.raises(ConfigError, match="map_location='cuda:0': tensors are loaded to the CPU only"):
        io.load_checkpoint(tmp_path / "x", map_location="cuda:0")
    save_file(tmp_path / "y", Checkpoint(step=1))
    with pytest.raises(ConfigError, match="not written by Lightning or Fabric"):
        io.load_checkpoint(tmp_path / "y")
    torch.save({"state_dict": {}}, tmp_path / "z.ckpt")
    with pytest.raises(CorruptCheckpoint, match=r"z\.ckpt: "):
        io.load_checkpoint(tmp_path / "z.ckpt")
    with pytest.raises(ConfigError, match='save_last="link"'):
        DistrustModelCheckpoint(tmp_path, save_last="link")


def test_several_devices_and_a_missing_plugin_are_refused(tmp_path, monkeypatch):
    callback = DistrustModelCheckpoint(tmp_path / "checkpoints")
    several = trainer(folder=tmp_path, strategy="ddp", devices=2, plugins=[DistrustCheckpointIO()])
    with pytest.raises(ConfigError, match="one process on one device"):
        callback.setup(several, None, "fit")
    with pytest.raises(ConfigError, match=r"needs Trainer\(plugins=\[DistrustCheckpointIO\(\)\]\)"):
        trainer(folder=tmp_path, callbacks=[callback], max_steps=1).fit(Model(tmp_path), loader(Run()))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ConfigError, match="only one process on one device"):
        DistrustCheckpointIO().save_checkpoint(STATE, tmp_path / "x")


def test_random_state_says_when_a_resume_is_not_exact(tmp_path):
    for every, saved_with, text in (
        (5, [], "the checkpoint was saved without RandomState: other random numbers follow"),
        (BATCHES, [RandomState()], "saved on an epoch's last batch, where Lightning loses the position of a"),
    ):
        folder = tmp_path / str(every)
        fit(folder, Run(every=every), callbacks=saved_with, max_steps=every)
        with warnings.catch_warnings(record=True) as warned:  # Lightning warns, too
            warnings.simplefilter("always")
            fit(folder, Run(every=every), callbacks=[RandomState()], max_steps=every + 1)
        messages = [str(item.message) for item in warned if issubclass(item.category, DistrustWarning)]
        assert len(messages) == 1
        assert messages[0].startswith(text)


# The same code under its other name


UNDER_ITS_OTHER_NAME = """
import logging, sys, warnings
for name in [*sys.modules]:  # a fork has imported it
    if name.split(".")[0] == "lightning":
        del sys.modules[name]
import pytorch_lightning, torch
from distrust.integrations.lightning import DistrustCheckpointIO, DistrustModelCheckpoint, RandomState

warnings.simplefilter("ignore")
class Model(pytorch_lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(2, 1)
    def training_step(self, batch, number):
        return self.net(batch).sum()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
for steps in (3, 5):
    trainer = pytorch_lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False,
        plugins=[DistrustCheckpointIO()],
        callbacks=[RandomState(), DistrustModelCheckpoint(sys.argv[1], every_n_train_steps=2)],
    )
    trainer.fit(Model(), torch.utils.data.DataLoader(torch.randn(10, 2)), ckpt_path="last")
assert "lightning.pytorch" not in sys.modules
"""


def test_pytorch_lightning_works_too(forked_python, tmp_path):
    command = [forked_python, "-c", UNDER_ITS_OTHER_NAME, tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert CheckpointManager(tmp_path).list_checkpoints() == [2, 4]  # Lightning keeps what it resumed from
