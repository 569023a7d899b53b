"""``distrust train`` in several processes, its ranks: the flags that start them, and what their ends mean."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from distrust.activity import STOPPING
from distrust.config import TrainConfig, flag
from distrust.errors import ConfigError

_LAUNCHER = "DISTRUST_LAUNCHER"  # its process id, in the environment of its ranks


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The flags that start ranks. No options of the run, which is the same with any of them."""

    nproc: str | None = None
    """Processes of this machine that train together, called ranks: a number, or "gpu" for one on each GPU.
    Default: this one."""
    nnodes: str = "1"
    """Machines, each of which runs this command: a number, or MIN:MAX to go on without some of them."""
    rendezvous: str | None = None
    """HOST:PORT where the machines meet: an address of one of them, whose port only they may reach."""
    max_restarts: int = 0
    """How often the ranks start again, from the newest checkpoint, after one has failed."""

    def __post_init__(self) -> None:
        is_rank = "RANK" in os.environ and _LAUNCHER not in os.environ
        low, high = self.machines
        port = re.fullmatch(r"[\w.-]+:([0-9]{1,5})", self.rendezvous or "")
        names = [option.name for option in fields(self)]
        for is_wrong, advice, wrong in (
            (is_rank, "this process is a rank already", names),
            (self.nproc is None, "give --nproc with it", names),
            (self.rendezvous is None, "give --rendezvous with it", ["nnodes"]),
            (not re.fullmatch("gpu|[1-9][0-9]{0,3}", self.nproc or ""), "give 1 or more, or gpu", ["nproc"]),
            (not 1 <= low <= high, "give 1 or more, or MIN:MAX", ["nnodes"]),
            (not port or not 0 < int(port[1]) < 2**16, "give HOST:PORT", ["rendezvous"]),
            (self.max_restarts < 0, "give 0 or more", ["max_restarts"]),
        ):
            for name in wrong if is_wrong else ():
                if getattr(self, name) != getattr(Launch, name):
                    raise ConfigError(f"{flag(name)} is {getattr(self, name)!r}: {advice}")

    @property
    def machines(self) -> tuple[int, int]:
        """Minimum and maximum; (0, 0) for what is neither a number nor MIN:MAX."""
        match = re.fullmatch("([0-9]{1,4})(?::([0-9]{1,4}))?", self.nnodes)
        return (int(match[1]), int(match[2] or match[1])) if match else (0, 0)

    @property
    def starts_ranks(self) -> bool:
        """Whether there are any to start; a rank has the flags of its launcher."""
        alone = self.nproc in (None, "1") and self.rendezvous is None and not self.max_restarts
        return not alone and _LAUNCHER not in os.environ


def launch(flags: Launch, config: TrainConfig, arguments: Sequence[str]) -> int:
    """Run ``distrust train`` with these arguments in several processes; returns the exit code."""
    from distrust.engines import require_installed, select_engine

    if select_engine(config) == "mlx":
        raise ConfigError(f"--nproc is {flags.nproc!r}: start ranks of mlx with mlx.launch")
    require_installed("torch", purpose="--nproc")
    # Only now that the flags are known to be right: torch takes seconds to load.
    from distrust.engines.micro_batches import require_enough
    from distrust.engines.torch import elastic, runtime
    from distrust.trainer import DistrustTrainer

    count = 0 if flags.nproc == "gpu" else int(flags.nproc or 1)
    DistrustTrainer(config)  # an error in the options is reported once, not by each rank
    runtime.choose_device(config.device, local_count=count)
    require_enough(config, count * flags.machines[0])
    os.environ[_LAUNCHER] = str(os.getpid())
    if os.getcwd() not in map(os.path.abspath, sys.path):  # its files are not for ranks to import
        os.environ["PYTHONSAFEPATH"] = "1"
    codes = elastic.run_ranks(
        [sys.executable, "-m", "distrust", "train", *arguments],
        count,
        endpoint=flags.rendezvous,
        machines=flags.machines,
        max_restarts=flags.max_restarts,
    )
    for rank, code in codes.items():
        if code < 0 and -code not in STOPPING:
            print(f"distrust: rank {rank} was killed by {signal.Signals(-code).name}", file=sys.stderr)
    return exit_code(codes.values())


def exit_code(codes: Iterable[int]) -> int:
    """That of a run whose ranks ended with these, negative for a signal, as of subprocess.Popen.

    A rank that is killed makes others fail, and one that fails makes the launcher stop the others.
    """

    def severity(code: int) -> int:
        return 3 if code > 128 and code - 128 not in STOPPING else 2 if 0 < code < 128 else code > 0

    return max((128 - code if code < 0 else code for code in codes), key=severity, default=1)


def end_with_agent() -> None:
    """Let a rank stop and save when the agent that started it dies (Linux only): nothing else would end it.

    Raises ConfigError if torchrun would start it again in a way that fails.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts != "0" and os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
        raise ConfigError(
            f"torchrun --max-restarts {restarts}: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for it; "
            "otherwise ranks that start again meet those that have ended"
        )
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the run handles it: the launcher reports it
    if sys.platform == "linux":
        import ctypes

        agent = os.environ.get(_LAUNCHER) or str(os.getppid())
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if agent != str(os.getppid()):  # it was dead already
            os.kill(os.getpid(), signal.SIGTERM)
