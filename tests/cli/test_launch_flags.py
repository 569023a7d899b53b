"""The flags of ``distrust train`` that start several processes."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--nproc 0", "--nproc is '0': give 1 or more, or gpu"),
        ("--nproc all", "--nproc is 'all': give 1 or more, or gpu"),
        ("--nproc gpu", "--nproc is 'gpu': torch sees no GPU; give a number"),
        ("--nproc 2 --nnodes 3:2 --rendezvous a:1", "--nnodes is '3:2': give 1 or more, or MIN:MAX"),
        ("--nproc 2 --nnodes 2", "--nnodes is '2': give --rendezvous with it"),
        ("--nproc 2 --nnodes 2 --rendezvous a", "--rendezvous is 'a': give HOST:PORT"),
        ("--nproc 2 --nnodes 2 --rendezvous a:65536", "--rendezvous is 'a:65536': give HOST:PORT"),
        ("--nproc 2 --max-restarts -1", "--max-restarts is -1: give 0 or more"),
        ("--max-restarts 1", "--max-restarts is 1: give --nproc with it"),
        ("--nproc 2 --device cuda:7", "--device cuda:7: not available to torch"),
        ("--nproc 2 --model m", "--model m: give the examples to train it on with --data"),
        ("--nproc 2 --engine mlx", "--nproc is '2': start ranks of mlx with mlx.launch"),
        ("--nproc 2 --batch-size 0", "--batch-size is 0: give 1 or more"),
        ("--nproc 2", "--gradient-accumulation 1: 2 ranks need 2 or more"),
        ("--nproc 2 --shard all", "--shard is 'all': give --lora-rank 0 with it"),
    ],
)
def test_a_mistake_is_one_line_and_starts_nothing(distrust, flags, message, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setenv("DISTRUST_LAUNCHER", "")  # a launcher sets it for its ranks
    monkeypatch.delenv("DISTRUST_LAUNCHER")
    output = distrust("train", *flags.split())
    assert output.err.startswith(f"distrust: {message}")
    assert (output.code, output.err.count("\n")) == (2, 1)


def test_a_rank_refuses_to_launch(distrust, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    output = distrust("train", "--nproc", "2")
    assert output.code == 2
    assert output.err.startswith("distrust: --nproc is '2': this process is a rank")


def test_torchrun_with_restarts_needs_a_store_for_each_start(distrust, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.delenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", raising=False)
    output = distrust("train", "--out", "unused")
    assert output.code == 2
    assert "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in output.err
    assert output.err.count("\n") == 1
