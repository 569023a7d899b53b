"""``--shard all``: ranks that each train a part of all weights, and write one file together."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from distrust.checkpoint import CheckpointManager
from distrust.cli import main
from distrust.testing.models import write_records

SCENARIO = "tests.ranks.shard_all_scenarios"
MIB = 1 << 20


@pytest.fixture(scope="module")
def options(tiny_model, tiny_config, eval_data, tmp_path_factory):
    """The options of a run, by the name of its folder."""
    folder = tmp_path_factory.mktemp("sharded")
    data = str(write_records(folder / "data.jsonl", 30, seed=0))

    def make(name, **changes):
        config = {
            **vars(tiny_config(folder / name)),
            "model": str(tiny_model),
            "data": data,
            "eval_data": str(eval_data),
            "lora_rank": 0,
            "shard": "all",
            "batch_size": 1,
            "gradient_accumulation": 6,
            "max_steps": 3,
            "save_every": 2,
            "keep_last": 9,
            "eval_every": 3,
        }
        return {**config, **changes}

    return make


@pytest.fixture(scope="module")
def three_ranks(world, options):
    """A run of three ranks: its options, and the digest of its end."""
    config = options("three")
    values = world.values(f"{SCENARIO}:train", count=3, config=config)
    digest = values[0][0]
    assert values == [[digest, []]] * 3
    return config, digest


def checkpoints(config) -> CheckpointManager:
    return CheckpointManager(Path(config["out"]) / "checkpoints")


def branch(three_ranks, options, name, **changes):
    """The options of a run that resumes from step 2 of the three ranks'."""
    config = options(name, **changes)
    manager = checkpoints(config)
    manager.directory.mkdir(parents=True)
    shutil.copy(checkpoints(three_ranks[0]).inspect(2).path, manager.directory)
    return config


def test_a_resumed_run_has_the_same_bits_on_as_many_ranks(three_ranks, world, options):
    config = branch(three_ranks, options, "resumed")
    assert world.values(f"{SCENARIO}:train", count=3, config=config) == [[three_ranks[1], []]] * 3


@pytest.mark.parametrize("count", [1, 2])
def test_on_another_number_of_ranks_it_says_so_and_is_equal_up_to_rounding(
    three_ranks, world, options, count
):
    shard = "all" if count > 1 else "none"
    config = branch(three_ranks, options, f"on-{count}", shard=shard)
    (digest, warnings), *_ = world.values(f"{SCENARIO}:train", count=count, config=config)
    expected, weights = (checkpoints(each).load(3).model for each in (three_ranks[0], config))
    assert weights.keys() == expected.keys()
    difference = max(np.abs(weights[name] - expected[name]).max() for name in expected)
    assert difference < 1e-6, (digest, difference)
    changes = [text.partition("bit-identical: ")[2] for text in warnings]
    assert (f"ranks was 3, is {count}" if count > 1 else "shard was all, is none") in changes, warnings


def test_it_is_the_run_of_one_process_up_to_rounding_with_the_same_files(three_ranks, world, options):
    config = options("alone", shard="none")
    world.values(f"{SCENARIO}:train", count=1, config=config)
    for step in (2, 3):
        alone, shared = (checkpoints(each).inspect(step).header for each in (config, three_ranks[0]))
        assert [each[:3] for each in alone.tensors] == [each[:3] for each in shared.tensors]
    weights, expected = (checkpoints(each).load(3).model for each in (three_ranks[0], config))
    assert max(np.abs(weights[name] - expected[name]).max() for name in expected) < 1e-6
    back = branch((config, ""), options, "back")  # a single process's checkpoint, on several ranks
    (_, warnings), *_ = world.values(f"{SCENARIO}:train", count=2, config=back)
    assert any("shard was none, is all" in text for text in warnings)


@pytest.mark.parametrize("count", [1, 4])
def test_a_checkpoint_loads_and_is_saved_on_any_number_of_ranks(three_ranks, world, options, tmp_path, count):
    shard = "all" if count > 1 else "none"
    config = options(f"loaded-{count}", shard=shard, gradient_accumulation=count)
    values = world.values(
        f"{SCENARIO}:load_and_save",
        count=count,
        config=config,
        source=str(checkpoints(three_ranks[0]).directory),
        target=str(tmp_path),
    )
    assert values == values[:1] * count
    assert values[0][2]
    assert CheckpointManager(tmp_path).inspect(3).state_digest == three_ranks[1]
    CheckpointManager(tmp_path).validate(3)


def test_with_other_options_a_resume_has_the_same_bits_too(world, options):
    changes = {
        "packing": True,
        "max_length": 40,
        "dtype": "bfloat16",
        "gradient_checkpointing": True,
        "reload_every": 2,
        "eval_every": 1,
        "gradient_accumulation": 2,
    }
    config = options("other", **changes)
    values = world.values(f"{SCENARIO}:train", count=2, config=config)
    resumed = branch((config, ""), options, "other-resumed", **changes)
    assert world.values(f"{SCENARIO}:train", count=2, config=resumed) == values
    assert values[0][1] == []


def test_a_rank_that_is_killed_in_a_save_leaves_the_checkpoints_before(three_ranks, world, options):
    config = branch(three_ranks, options, "killed")
    outcomes = world.run(f"{SCENARIO}:train_and_die", count=3, config=config, rank=1, at_step=3, seconds=30)
    assert outcomes[1].code == -signal.SIGKILL
    assert all(outcome.code or outcome.error for outcome in outcomes), outcomes
    manager = checkpoints(config)
    assert manager.list_checkpoints() == [2]
    manager.validate(2)
    assert world.values(f"{SCENARIO}:train", count=3, config=config) == [[three_ranks[1], []]] * 3


def test_commands_read_what_several_ranks_wrote(three_ranks, capsys):
    for command in ("verify", "ls", "show"):
        assert main([command, three_ranks[0]["out"]]) == 0, capsys.readouterr()


def test_memory_is_bounded_by_two_tensors_and_blocks(world, options, tmp_path):
    tensors, rows = 9, 2048  # 8 MiB each
    growth = world.values(
        f"{SCENARIO}:save_large",
        count=2,
        config=options("large"),
        target=str(tmp_path),
        tensors=tensors,
        rows=rows,
    )
    tensor, share = rows * 4096, tensors * rows * 4096 // 2
    for rank in growth:
        assert rank["save"] < 64 * MIB, growth
        assert rank["save in the background"] < share + 64 * MIB, growth  # with the snapshot
        assert rank["load"] < 2 * tensor + 64 * MIB, growth


@pytest.mark.parametrize(
    ("count", "changes", "reason"),
    [
        (1, {}, "there is only one process"),
        (2, {"gradient_accumulation": 3}, "give a multiple of 2 to --gradient-accumulation"),
    ],
)
def test_what_it_cannot_do_is_refused_at_once(world, options, count, changes, reason):
    outcomes = world.run(f"{SCENARIO}:train", count=count, config=options("refused", **changes))
    kind, text = outcomes[0].error
    assert kind == "ConfigError"
    assert text.startswith("--shard all: ")
    assert reason in text
