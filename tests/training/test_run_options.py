"""The folder of a run holds its options, and is enough to resume it; a run ends before its schedule does."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrust import CheckpointManager
from distrust.cli.train import parse
from distrust.engines import config_of_run
from distrust.errors import CheckpointNotFound, ConfigError, DistrustWarning, ResumeRefused
from distrust.options import to_toml
from distrust.testing.toy_engine import TOY, ToyEngine
from distrust.training.events import StepEnded

text = st.text(st.characters(exclude_categories=["Cs"]))  # surrogates are no text
finite = st.floats(allow_nan=False, allow_infinity=False)  # as every option is
scalars = text | st.integers() | finite | st.booleans()


def steps_of(events):
    return [event.step for event in events if isinstance(event, StepEnded)]


def digest_of(out):
    return CheckpointManager(out / "checkpoints").scan().files[-1].state_digest


@given(
    st.dictionaries(
        st.from_regex("[a-z_]+", fullmatch=True),
        scalars | st.lists(text) | st.lists(finite),
    )
)
def test_every_option_comes_back_from_toml(values):
    assert tomllib.loads(to_toml(values)) == values


def options_of(config):
    return {name: getattr(config, name) for name in config.__dataclass_fields__ if name != "engine"}


def resume(run, folder, **changes):
    """Train with the options in a run's folder, and nothing else."""
    return run(**options_of(config_of_run(folder)) | changes)


def test_a_run_is_resumed_by_its_folder_alone(run, data, tmp_path, monkeypatch):
    alone, _ = run(tmp_path / "alone", seed=3, weighting="published", max_ratio=2.5)
    monkeypatch.chdir(data.parent)
    run(tmp_path / "run", seed=3, weighting="published", max_ratio=2.5, data=data.name, stop_after=4)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").rename(tmp_path / "moved")  # the data's name was relative; the folder has moved
    ended, events = resume(run, tmp_path / "moved")
    assert steps_of(events) == [5, 6, 7, 8, 9]
    assert ended.state_digest == alone.state_digest
    assert resume(run, tmp_path / "moved")[0].already_finished


def test_the_options_of_a_run_are_those_of_a_new_one(run, data, tmp_path):
    alone, _ = run(tmp_path / "run", seed=3)
    values = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert values == {
        **TOY,
        "data": str(data), "out": str(tmp_path / "run"), "seed": 3, "max_length": 1024, "schedule_steps": 9,
        "weighting": "monotone", "dtype": "float32", "date": values["date"],
    }  # fmt: skip
    config = parse(["--config", str(tmp_path / "run" / "config.toml"), "--out", str(tmp_path / "again")])
    again, _ = run(**options_of(config))
    assert again.state_digest == alone.state_digest


def test_a_run_of_an_earlier_version_is_resumed_by_its_newest_checkpoint(run, tmp_path):
    alone, _ = run(tmp_path / "alone", seed=3)
    run(tmp_path / "run", seed=3, stop_after=4)
    (tmp_path / "run" / "config.toml").unlink()
    ended, events = resume(run, tmp_path / "run", engine=ToyEngine())
    assert (steps_of(events), ended.state_digest) == ([5, 6, 7, 8, 9], alone.state_digest)
    with pytest.raises(CheckpointNotFound):
        config_of_run(tmp_path / "nothing")


def test_a_file_of_the_users_own_is_kept(run, tmp_path):
    (tmp_path / "run").mkdir()
    file = tmp_path / "run" / "config.toml"
    file.write_text("# Mine: a low rate for the small model\nlearning_rate = 1e-3\n")
    mine = file.read_bytes()
    with pytest.warns(DistrustWarning, match=r"config.toml: is kept, because you wrote it"):
        run(tmp_path / "run", learning_rate=1e-3)
    assert file.read_bytes() == mine
    run(tmp_path / "other", seed=1, stop_after=4)
    file = tmp_path / "other" / "config.toml"
    run(tmp_path / "other", seed=1, keep_last=7)
    assert file.read_text().startswith("# Written by distrust train")
    assert tomllib.loads(file.read_text())["keep_last"] == 7  # ours is replaced


def test_a_finished_run_needs_no_data_from_any_folder(run, data, tmp_path, monkeypatch):
    (tmp_path / "data.jsonl").write_bytes(data.read_bytes())
    monkeypatch.chdir(tmp_path)
    run(tmp_path / "run", data="data.jsonl")
    (tmp_path / "data.jsonl").unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert resume(run, tmp_path / "run")[0].already_finished
    (tmp_path / "elsewhere" / "data.jsonl").write_text(data.read_text() * 2)
    with pytest.raises(ResumeRefused):  # of the same name, and other data
        run(tmp_path / "run", data="data.jsonl")


def test_a_branch_that_was_killed_before_its_first_save_begins_again(run, tmp_path):
    run(tmp_path / "run", keep_last=9)
    alone, _ = run(tmp_path / "run", from_step=4, branch=str(tmp_path / "whole"), save_every=0)
    run(tmp_path / "run", from_step=4, branch=str(tmp_path / "branch"), stop_after=5)
    for path in (tmp_path / "branch" / "checkpoints").glob("*.safetensors"):
        path.unlink()
    config = config_of_run(tmp_path / "branch")
    assert (config.from_step, config.branch) == (4, str(tmp_path / "branch"))
    ended, _ = run(**options_of(config))
    assert ended.state_digest == alone.state_digest
    assert config_of_run(tmp_path / "branch").branch is None


def test_flags_are_added_to_the_options_of_the_run(run, tmp_path):
    run(tmp_path / "run", max_steps=None, epochs=2, schedule="constant", seed=3)
    assert parse(["--resume", str(tmp_path / "run"), "--log-every", "7"]).log_every == 7
    longer = parse(["--resume", str(tmp_path / "run"), "--epochs", "5"])
    assert (longer.epochs, longer.max_steps, longer.seed) == (5, None, 3)
    assert resume(run, tmp_path / "run", epochs=5)[0].step == 14  # 11 records in steps of four
    for wrong in (["--out", "other"], ["--config", "a.toml"], ["--resume", "b"]):
        with pytest.raises(ConfigError, match="--resume"):
            parse(["--resume", str(tmp_path / "run"), *wrong])


def test_differences_of_options_data_and_model_are_reported_at_once(run, data, tmp_path):
    run(tmp_path / "run", stop_after=4)
    other_data = tmp_path / "other.jsonl"
    other_data.write_text("".join(data.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(ResumeRefused) as refused:
        resume(run, tmp_path / "run", seed=1, batch_size=3, data=str(other_data), engine=ToyEngine(base=1))
    assert [line.partition(" (")[0] for line in refused.value.differences] == [
        "--batch-size was 2, is 3",
        "--seed was 0, is 1",
        f"--data {other_data}: its content is not that of the run",
        "--model bundled: its content is not that of the run",
    ]
    with pytest.raises(ResumeRefused) as refused:  # also with what makes the data unreadable
        resume(run, tmp_path / "run", seed=1, data=str(tmp_path / "missing.jsonl"))
    first, second = refused.value.differences
    assert first == "--seed was 0, is 1"
    assert "missing.jsonl" in second


def test_data_that_is_read_differently_names_the_option(run, data, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(
            f'{{"text": "ore {i}", "note": "tin {i}", "authority_weight": 0.1, "provenance_entropy": 1}}\n'
            for i in range(11)
        )
    )
    run(tmp_path / "run", data=str(data), stop_after=4)
    with pytest.raises(ResumeRefused) as refused:
        resume(run, tmp_path / "run", text_column="note")
    (line,) = refused.value.differences
    assert f"--data {data}: is read differently: --text-column was None, is note (was " in line


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_a_run_that_would_go_on_at_learning_rate_0_is_refused(run, tmp_path, schedule):
    run(tmp_path / "run", schedule=schedule)
    digest = digest_of(tmp_path / "run")
    with pytest.raises(ConfigError) as refused:
        run(tmp_path / "run", schedule=schedule, max_steps=12)
    message = str(refused.value)
    assert "12 steps, but its schedule ends at step 9" in message
    # Of nine steps with wsd, the last one decays.
    options = f"--config {tmp_path / 'run' / 'config.toml'} --branch NEW --from-step 8, or less"
    instead = options if schedule == "wsd" else "--schedule constant or wsd"
    for remedy in (instead, f"--from {tmp_path / 'run'} --out NEW"):
        assert remedy in message
    assert digest_of(tmp_path / "run") == digest
    assert run(tmp_path / "run", schedule=schedule)[0].already_finished
    with pytest.raises(ConfigError, match=r"its schedule ends at step 5.*give --schedule-steps"):
        run(tmp_path / "new", schedule=schedule, schedule_steps=5)
    # The option that was given is named, and a warm-up that is longer than the schedule.
    short = {"schedule": schedule, "schedule_steps": 3, "warmup_steps": 5}
    with pytest.raises(ConfigError) as refused:
        run(tmp_path / "warm", max_steps=None, epochs=9, **short)
    assert str(refused.value).startswith("--epochs 9: the run would have ")
    assert " ends with the warm-up, which is longer than its 3 steps, at step 5, and " in str(refused.value)
    # Less than the schedule is never refused, nor is going on to its end.
    run(tmp_path / "short", schedule=schedule, max_steps=5, schedule_steps=9)
    assert run(tmp_path / "short", schedule=schedule)[0].state_digest == digest


def test_a_run_cannot_end_before_a_step_that_it_has_made(run, tmp_path):
    run(tmp_path, stop_after=5)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"^--max-steps 3: the run is at step 5 already; give 5 or more$"):
        run(tmp_path, max_steps=3)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
    run(tmp_path)
    with pytest.raises(ConfigError, match="--max-steps 8: the run is at step 9 already; give 9 or more"):
        run(tmp_path, max_steps=8)
    assert run(tmp_path)[0].already_finished
    epochs = {"max_steps": None, "schedule": "constant"}
    finished, _ = run(tmp_path / "epochs", epochs=3, **epochs)
    with pytest.raises(
        ConfigError, match=rf"^--epochs 1, .* steps: .* step {finished.step} already; give more"
    ):
        run(tmp_path / "epochs", epochs=1, **epochs)


@pytest.mark.parametrize(("stop", "grows"), [(3, True), (6, True), (7, False), (9, False)])
def test_a_stable_phase_may_become_longer(run, tmp_path, stop, grows):
    """Nine steps of which three decay: the sixth is the last of the stable phase."""
    options = {"schedule": "wsd", "decay_ratio": 0.3}
    alone, _ = run(tmp_path / "alone", max_steps=14, **options)
    run(tmp_path / "run", stop_after=stop, **options)
    if grows:
        assert run(tmp_path / "run", max_steps=14, **options)[0].state_digest == alone.state_digest
    else:
        with pytest.raises(ConfigError, match="its schedule ends at step 9"):
            run(tmp_path / "run", max_steps=14, **options)


def test_a_warm_up_that_depends_on_the_schedule_is_not_changed(run, tmp_path):
    options = {"schedule": "wsd", "warmup_ratio": 0.5}
    run(tmp_path / "run", stop_after=3, **options)
    with pytest.raises(ConfigError, match=r"its schedule ends at step 9.*without --warmup-ratio"):
        run(tmp_path / "run", max_steps=20, **options)


def test_a_branch_names_the_run_that_it_would_come_from(run, tmp_path):
    run(tmp_path / "run", keep_last=9)
    with pytest.raises(ConfigError, match=f"--from {tmp_path / 'run'} --out NEW"):
        run(tmp_path / "run", from_step=8, branch=str(tmp_path / "branch"), max_steps=20)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_a_run_that_was_killed_before_its_first_save_may_become_longer(run, tmp_path, schedule):
    alone, _ = run(tmp_path / "alone", max_steps=12, schedule=schedule)
    run(tmp_path / "run", schedule=schedule, stop_after=1)
    for path in (tmp_path / "run" / "checkpoints").glob("*.safetensors"):
        path.unlink()
    assert resume(run, tmp_path / "run", max_steps=12)[0].state_digest == alone.state_digest


def test_another_path_than_that_of_the_run_is_explained(run, tmp_path):
    run(tmp_path / "run")
    file = next((tmp_path / "run" / "checkpoints").glob("*-final.safetensors"))
    for path in (file, file.parent):
        with pytest.raises(ConfigError, match=f"give the folder of the run: --resume {tmp_path / 'run'}$"):
            config_of_run(path)
    file = file.rename(tmp_path / "one.safetensors")
    with pytest.raises(ConfigError, match=f"is no run; to begin one: --from {file} --out NEW"):
        config_of_run(file)


def test_the_day_of_the_first_start_stays(run, tmp_path):
    run(tmp_path / "run", date="2026-11-20", stop_after=4)
    run(tmp_path / "run")
    assert config_of_run(tmp_path / "run").date == "2026-11-20"
    (tmp_path / "run" / "config.toml").unlink()  # as in a run of an earlier version
    assert config_of_run(tmp_path / "run").date == "2026-11-20"
