"""``--device`` of commands that read a run: it may have been trained on a GPU that is not here."""

from __future__ import annotations

import pytest
import torch

from distrust.engines.torch import runtime
from distrust.testing.models import train_arguments

ABSENT = "cuda:99"
REFUSED = f"distrust: --device {ABSENT}: not available to torch "


@pytest.fixture(scope="module")
def moved_run(folder, tmp_path_factory):
    """A finished run whose records say that it was trained on a GPU."""
    from distrust.cli import main

    out = tmp_path_factory.mktemp("moved") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "choose_device", lambda requested, **_: torch.device("cpu"))
        options = ["--engine", "torch", "--device", ABSENT, "--max-steps", 2]
        assert main(train_arguments(folder, out, *options)) == 0
    return out


@pytest.mark.parametrize("verb", ["eval", "generate"])
def test_a_run_is_read_on_the_devices_of_this_machine(distrust, folder, moved_run, verb):
    arguments = {
        "eval": ["--data", folder / "data.jsonl", "--compare"],
        "generate": ["--prompt", "ore", "--max-new-tokens", 2, "--compare"],
    }[verb]
    for option in ((), ("--device", "cpu")):
        output = distrust(verb, moved_run, *arguments, *option)
        assert output.code == 0, output.err
    output = distrust(verb, moved_run, *arguments, "--device", ABSENT)
    assert output.code == 2
    assert output.err.splitlines()[-1].startswith(REFUSED)
    assert "Traceback" not in output.err


def test_it_is_exported(distrust, moved_run, tmp_path):
    for form in ("adapter", "merged"):
        output = distrust("export", moved_run, "--to", tmp_path / form, "--format", form)
        assert output.code == 0, output.err


def test_it_resumes_on_a_device_that_is_stated(distrust, moved_run):
    resume = ["train", "--resume", moved_run, "--max-steps", 3]
    output = distrust(*resume)
    assert (output.code, output.err.count("\n")) == (2, 1)
    assert output.err.startswith(REFUSED)
    assert distrust(*resume, "--device", "cpu").code == 0
