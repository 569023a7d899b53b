"""What happens to the ranks of an attempt, and what must follow from it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from signal import SIGCONT, SIGINT, SIGKILL, SIGSTOP, SIGTERM, SIGUSR1

from campaigns.disks.volumes import Filler
from campaigns.ranks.layouts import Layout
from campaigns.ranks.machines import Machines
from campaigns.ranks.processes import Group, children, send

#: ``--rank-timeout`` of the attempts that need it to end, and of the others.
RANK_TIMEOUT, LONG_RANK_TIMEOUT = 5, 20
#: From the death of a rank to the end of the others.
AFTER_KILL = 1.0
#: The same after a rank, or the link to it, answers no more.
AFTER_SILENCE = RANK_TIMEOUT + 2.0
#: From a signal to the end: a step and a save, on a busy machine.
AFTER_SIGNAL = 5.0
#: From a full disk to the end: three saves that fail.
AFTER_FULL_DISK = 10.0
#: How long a machine is away that returns.
MOST_ABSENCE = 5.0
STOPS = (SIGTERM, SIGUSR1, SIGINT)


@dataclass
class Consequence:
    """What must follow from an accident that struck in the loop."""

    survivors: Sequence[int]  # the processes that must end by themselves
    seconds: float  # in which they must
    codes: set[int]  # with which what was started may end, unless the accident killed it
    victims: Sequence[int] = ()  # killed or stopped by the accident
    saved: bool = False  # whether the last step that was trained is saved
    finishes: bool = False  # whether the run goes on to its end
    undo: Callable[[], object] = field(default=lambda: None)  # called once the survivors have ended


@dataclass
class Scene:
    """Where an accident happens."""

    rng: random.Random
    layout: Layout
    group: Group
    machines: Machines | None
    filler: Filler | None  # of the leader's disk
    start_agent: Callable[[int], int]  # starts that of a machine; returns its process id

    def __post_init__(self) -> None:
        self.ranks = self.group.ranks()


def kill_rank(scene: Scene) -> Consequence:
    return _kill(scene, [scene.rng.choice(scene.ranks)])


def kill_several(scene: Scene) -> Consequence:
    return _kill(scene, scene.rng.sample(scene.ranks, scene.rng.randint(2, len(scene.ranks))))


def _kill(scene: Scene, victims: Sequence[int]) -> Consequence:
    for pid in victims:
        send(pid, SIGKILL)
    survivors = [pid for pid in scene.ranks if pid not in victims]
    return Consequence(survivors, AFTER_KILL, codes={1, 128 + SIGKILL}, victims=victims)


def stop_rank(scene: Scene) -> Consequence:
    """A rank that answers no more; once the others have ended, it goes on and must end, too."""
    victim = scene.rng.choice(scene.ranks)
    send(victim, SIGSTOP)
    survivors = [pid for pid in scene.ranks if pid != victim]
    return Consequence(survivors, AFTER_SILENCE, codes={1}, undo=lambda: send(victim, SIGCONT))


def signal_one(scene: Scene) -> Consequence:
    return _signal(scene, [scene.rng.choice(scene.ranks)])


def signal_all(scene: Scene) -> Consequence:
    return _signal(scene, [*scene.ranks, *(scene.group.pids if scene.group.are_agents else [])])


def signal_agent(scene: Scene) -> Consequence:
    return _signal(scene, [scene.rng.choice(scene.group.pids)])


def _signal(scene: Scene, pids: Sequence[int]) -> Consequence:
    number = scene.rng.choice(STOPS)
    for pid in pids:
        send(pid, number)
    return Consequence(scene.ranks, AFTER_SIGNAL, codes={128 + number}, saved=True)


def kill_agent(scene: Scene) -> Consequence:
    """The ranks of an agent that died must not train on."""
    victim = scene.rng.choice(scene.group.pids)
    send(victim, SIGKILL)
    codes = {128 + SIGTERM}
    if len(scene.group.pids) > 1:  # the other one may have met at it, and fail before its ranks end
        codes.add(1)
    return Consequence(scene.ranks, AFTER_SIGNAL, codes=codes, victims=[victim], saved=True)


def fill_disk(scene: Scene) -> Consequence:
    assert scene.filler is not None
    scene.filler.fill(0)
    return Consequence(scene.ranks, AFTER_FULL_DISK, codes={1}, undo=scene.filler.remove)


def cut_link(scene: Scene) -> Consequence:
    assert scene.machines is not None
    scene.machines.cut()
    return Consequence(scene.ranks, AFTER_SILENCE, codes={1}, undo=scene.machines.mend)


def lose_machine(scene: Scene) -> Consequence:
    """The processes of a machine die; the other machine's kernel is told, as by a machine that restarts."""
    return _lose_machine(scene, AFTER_KILL)


def lose_machine_silently(scene: Scene) -> Consequence:
    """Power and link of a machine are gone at once: nothing tells the other one."""
    assert scene.machines is not None
    scene.machines.cut()
    consequence = _lose_machine(scene, AFTER_SILENCE)
    consequence.undo = scene.machines.mend
    return consequence


def lose_machine_for_a_while(scene: Scene) -> Consequence:
    """The machine that does not host the rendezvous is lost and returns; meanwhile the other one goes on."""
    consequence = _lose_machine(scene, AFTER_KILL, index=1)
    consequence.survivors = []  # the other rank may still train alone, and the machine have just come
    delay = scene.rng.uniform(0, MOST_ABSENCE)

    def bring_back() -> None:
        end = time.monotonic() + delay
        while time.monotonic() < end and scene.group.poll() is None:
            time.sleep(0.01)
        scene.group.pids.append(scene.start_agent(1))

    consequence.undo = bring_back
    consequence.finishes = True
    return consequence


def _lose_machine(scene: Scene, seconds: float, *, index: int | None = None) -> Consequence:
    index = scene.rng.randrange(2) if index is None else index
    group = scene.group
    if group.are_agents:
        victims = [group.pids[index], *children(group.pids[index])]
    else:
        half = scene.layout.count // 2
        victims = group.pids[index * half : (index + 1) * half]
    for pid in victims:
        send(pid, SIGKILL)
    survivors = [pid for pid in scene.ranks if pid not in victims]
    return Consequence(survivors, seconds, codes={1, 128 + SIGKILL}, victims=victims)


@dataclass(frozen=True)
class Accident:
    name: str  # in the counts
    strike: Callable[[Scene], Consequence]
    weight: int  # how often it is drawn
    least_ranks: int = 1
    launched: bool | None = None  # whether it needs the launcher; None if it may be either
    two_machines: bool = False  # whether it needs them
    full_disk: bool = False  # whether it needs a disk of its own
    in_the_loop: bool = False  # whether it strikes only there
    is_silent: bool = False  # whether only --rank-timeout ends the other ranks
    options: tuple[str, ...] = ()  # of the launcher


ACCIDENTS = (
    Accident("SIGKILL of a rank", kill_rank, 40),
    Accident("SIGKILL of several ranks", kill_several, 8, least_ranks=2),
    Accident("SIGKILL of the agent", kill_agent, 12, least_ranks=2, launched=True),
    Accident("SIGSTOP of a rank", stop_rank, 4, least_ranks=2, in_the_loop=True, is_silent=True),
    Accident("a signal to one rank", signal_one, 6),
    Accident("a signal to all processes", signal_all, 4),
    Accident("a signal to the agent", signal_agent, 4, least_ranks=2, launched=True),
    Accident("a full disk", fill_disk, 4, full_disk=True, in_the_loop=True),
    Accident("a cut link", cut_link, 4, 2, two_machines=True, in_the_loop=True, is_silent=True),
    Accident("a lost machine", lose_machine, 12, least_ranks=2, two_machines=True),
    Accident(
        "a machine lost for a while", lose_machine_for_a_while, 4, 2, launched=True, two_machines=True,
        in_the_loop=True, options=("--nnodes", "1:2", "--max-restarts", "9"),
    ),
    Accident(
        "a silently lost machine", lose_machine_silently, 6, 2, two_machines=True, in_the_loop=True,
        is_silent=True,
    ),
)  # fmt: skip
