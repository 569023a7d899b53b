"""Ranks of mlx on this machine: what they exchange, the bits of one process, and the end of a rank."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distrust import CheckpointManager, ConfigError, RankLost, RanksDiffer, TrainConfig
from distrust.engines import create_engine, join_ranks
from distrust.engines.mlx.ranks import MlxRanks

pytest.importorskip("mlx")

OPTIONS: list[dict[str, Any]] = [
    {"lora_dropout": 0.2, "dora": True, "gradient_checkpointing": True},
    {"lora_rank": 0},
    {"reduction": "fast"},
]
#: Prints the state digest of each of OPTIONS after a step of three micro-batches.
STEPS = """
import json, sys
import numpy as np
from distrust import TrainConfig
from distrust.engines import create_engine, join_ranks
from campaigns.integrations.digest import digest
from tests.engines.small_batches import make_batch

model, options = sys.argv[1], json.loads(sys.argv[2])
configs = [TrainConfig(engine="mlx", device="cpu", model=model, gradient_accumulation=3, **each)
           for each in options]
with join_ranks(configs[0]) as ranks:
    for config in configs:
        engine, batches = create_engine(config, ranks=ranks), [make_batch()] * 3
        tokens = sum(batch.tokens for batch in batches)
        losses = engine.accumulate(batches, seed=1, step=1, tokens=tokens)
        norm = engine.clip_gradients(1.0)
        engine.update(learning_rate=1e-2)
        state = engine.state()
        parts = [norm, [[each.cross_entropy, each.weighted] for each in losses], state.model, state.optimizer]
        print(digest(json.loads(json.dumps(parts, default=lambda array: np.array(array).tolist()))))
"""

Start = Callable[..., list[subprocess.Popen[str]]]


def free_addresses(count: int) -> list[tuple[str, int]]:
    with ExitStack() as sockets:
        free = [sockets.enter_context(socket.socket()) for _ in range(count)]
        for each in free:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname() for each in free]


@pytest.fixture
def start(forked_python, tmp_path) -> Iterator[Start]:
    """Starts so many ranks with the variables of mlx.launch; kills those that are left after the test."""
    with ExitStack() as stack:

        def start(count: int, *arguments: object) -> list[subprocess.Popen[str]]:
            file = tmp_path / f"hosts-of-{count}.json"
            addresses = [[f"{host}:{port}"] for host, port in free_addresses(count)]
            file.write_text(json.dumps(addresses if count > 1 else ""))
            processes = []
            for rank in range(count):
                environment = {**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(file)}
                process = subprocess.Popen(
                    [forked_python, *map(str, arguments)],
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
                stack.callback(process.communicate)
                stack.callback(process.kill)
                processes.append(process)
            return processes

        yield start


def in_threads(work: Callable[[MlxRanks], Any], count: int, timeout: float = 10) -> list[Any]:
    """What each of so many ranks returns."""
    addresses = free_addresses(count)

    def run(index: int) -> Any:
        with MlxRanks(index, addresses, timeout) as ranks:
            return work(ranks)

    with ThreadPoolExecutor() as threads:
        return [*threads.map(run, range(count))]


def test_arrays_arrive_as_they_were_sent():
    def exchange(ranks: MlxRanks) -> tuple[int, int, str]:
        # The last ones exceed what sockets hold: all ranks send at the same time.
        for dtype, shape in [(np.int64, ()), (bool, (0,)), (np.float64, (2, 3)), (np.float32, (1 << 22,))]:
            value = np.full(shape, ranks.index + 1, dtype)
            rows = ranks.gather(value)
            assert rows.shape == (ranks.count, *shape)
            assert rows.dtype == dtype
            assert all((row == np.array(index + 1, dtype)).all() for index, row in enumerate(rows))
            ranks.broadcast(value)
            assert (value == np.array(1, dtype)).all()
        return ranks.local_index, ranks.local_count, ranks.describe(1)

    host = socket.gethostname()
    assert in_threads(exchange, 3) == [(index, 3, f"rank 1 ({host})") for index in range(3)]


@pytest.mark.parametrize(
    ("count", "timeout", "problem"), [(3, 10.0, r"rank 1 \(.*\) has ended"), (2, 0.3, "--rank-timeout 0.3")]
)
def test_a_rank_that_ends_or_is_silent_is_lost(count, timeout, problem):
    began = time.monotonic()

    def lose(ranks: MlxRanks) -> None:
        if ranks.index == 1 and count == 2:
            time.sleep(1)
        if ranks.index == 1:
            raise InterruptedError
        with pytest.raises(RankLost, match=problem) as error:
            ranks.gather(np.zeros(1), patient=count == 3)
        assert "\n" not in str(error.value)
        raise error.value

    with pytest.raises((RankLost, InterruptedError)):
        in_threads(lose, count, timeout)
    assert time.monotonic() - began < 5


def test_ranks_that_cannot_meet():
    first, second = free_addresses(2)
    with pytest.raises(RankLost, match=r"rank 0 cannot connect .*refused"):
        MlxRanks(0, [first, second], 0.1)
    with socket.create_server(first), pytest.raises(RankLost, match="Address already in use"):
        MlxRanks(0, [first, second], 0.1)
    with ThreadPoolExecutor() as threads:
        files = [first, second], [("localhost", first[1]), second]
        for rank in [threads.submit(MlxRanks, index, files[index], 5.0) for index in range(2)]:
            with pytest.raises(RanksDiffer, match="different files MLX_HOSTFILE"):
                rank.result()


def test_the_bits_are_those_of_one_process(start, tiny_model):
    arguments = "-c", STEPS, tiny_model, json.dumps(OPTIONS)
    outputs = []
    for process in (*start(1, *arguments), start(2, *arguments)[0]):
        output, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors
        outputs.append(output.splitlines())
    alone, two = outputs
    assert len({*alone}) == len({*two}) == len(OPTIONS)
    assert two[:-1] == alone[:-1]


def test_a_killed_run_goes_on_with_another_number_of_ranks(start, tiny_model, data, tmp_path):
    def train(count: int, name: str) -> list[subprocess.Popen[str]]:
        return start(
            count, "-m", "distrust", "train", "--engine", "mlx", "--device", "cpu", "--model", tiny_model,
            "--data", data, "--max-steps", 16, "--batch-size", 1, "--gradient-accumulation", 3,
            "--save-every", 4, "--lora-dropout", 0.2, "--max-length", 16, "--out", tmp_path / name,
        )  # fmt: skip

    ranks = train(3, "run")
    checkpoints = CheckpointManager(tmp_path / "run" / "checkpoints")
    while not checkpoints.list_checkpoints():
        time.sleep(0.01)
    ranks[1].send_signal(signal.SIGKILL)
    for rank in (0, 2):
        _, errors = ranks[rank].communicate(timeout=100)
        assert ranks[rank].returncode == 1
        (line,) = [line for line in errors.splitlines() if line.startswith("distrust: ")]
        assert "rank 1 " in line
        assert "has ended" in line
    for process in (*train(1, "run"), *train(1, "alone")):
        _, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors
    ends = [CheckpointManager(tmp_path / name / "checkpoints").scan().files[-1] for name in ("alone", "run")]
    assert ends[0].step == ends[1].step == 16
    assert ends[0].header.state_digest == ends[1].header.state_digest


@pytest.mark.parametrize(
    ("variables", "options", "problem"),
    [
        ({"NCCL_HOST_IP": "127.0.0.1"}, {}, "give it --backend ring"),
        ({"MLX_HOSTFILE": "/nowhere"}, {}, "MLX_HOSTFILE=/nowhere, MLX_RANK=0: not as mlx.launch sets them"),
        ({"MLX_HOSTFILE": "two", "MLX_RANK": "2"}, {}, "MLX_RANK=2: .* it has 2 ranks"),
        ({"MLX_HOSTFILE": "map"}, {}, "not as mlx.launch sets them"),
        ({"MLX_HOSTFILE": "two"}, {"engine": "torch"}, "give --engine mlx"),
        ({"MLX_HOSTFILE": "one"}, {"shard": "base"}, "--shard base: only --engine torch"),
    ],
)
def test_what_is_refused(tiny_model, tmp_path, monkeypatch, variables, options, problem):
    monkeypatch.chdir(tmp_path)
    for name, text in (("two", '[["127.0.0.1:1"], ["127.0.0.1:2"]]'), ("map", '{"a": 1}'), ("one", '""')):
        Path(name).write_text(text)
    for name, value in {"MLX_RANK": "0", **variables}.items():
        monkeypatch.setenv(name, value)
    config = TrainConfig(**{"engine": "mlx", "device": "cpu", "model": str(tiny_model), **options})
    with pytest.raises(ConfigError, match=problem) as error:
        create_engine(config, ranks=join_ranks(config))
    assert "\n" not in str(error.value)
