"""The cases of the campaign: each is one run, disturbed in one of several ways."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from campaigns import training_run, triggers
from campaigns.campaign import Campaign, Case, require
from campaigns.remote import checks, proxy, writers
from campaigns.remote.program import FAILED, FINISHED, REFUSED, REPLACED, Plan, Training
from campaigns.remote.servers import Store
from campaigns.remote.writers import Crew, KillAt, Writer
from distrust import CheckpointManager
from distrust.checkpoint.remote.line import parse_key

KILLS = 20  # of a run
STEPS = 150  # of a run
#: Seconds after which a silent writer is replaced, instead of the 60 of the product: all times are so much
#: shorter. Of an outage hours are simulated, with one writer, which needs no time to be scheduled.
PATIENCE, PATIENCE_IN_OUTAGES = 0.25, 0.1
TRAINER_KILLS = 3  # of a run of the real trainer
#: Bytes of a part that is not the last; S3 refuses smaller ones.
SMALLEST_PART = 5 << 20
#: Attempts in a row that may be refused: a request of a dead process may still arrive, and look like life.
REFUSALS = 4
#: In which a process cannot start: it must say so.
_DEAD = {"all 503", "expired", "all hang", "all cut"}
#: Which nothing notices that repeats its requests.
FLAKY = (
    "creations lost", "every third 503", "every second 503", "completes lost", "every second upload cut",
    "downloads cut", "slow",
)  # fmt: skip
#: After which what arrives here differs from what is there: a process may have to resume from an older one.
_FALSE_DOWNLOADS = {"downloads short", "downloads flipped", "all downloads flipped"}


@dataclass
class Bench:
    """What all cases share."""

    campaign: Campaign
    store: Store  # itself; this process uses it
    proxy: proxy.Proxy
    crew: Crew
    folder: Path
    behaviour: str | None = None  # of the store, at present

    def plan(self, case: Case) -> Plan:
        rng = case.rng
        return Plan(
            directory="",
            url=self.store.fresh_url(),
            environment=self.store.through(self.proxy.port).environment,
            number=0,
            seed=rng.randrange(1 << 32),
            steps=STEPS,
            sizes=tuple(int(10 ** rng.uniform(0, 3.8)) for _ in range(rng.randint(1, 5))),
            save_every=rng.choice([1, 1, 2]),
            keep_every_there=rng.choice([None, 5]),
            step_seconds=rng.choice([0.002, 0.005]),
            patience=PATIENCE,
            timeout=10 * PATIENCE,
            give_up_after=PATIENCE / 2,
            fault=self.campaign.options.fault,
        )

    def behave(self, name: str | None) -> None:
        if name is not None:
            self.campaign.count(f"times the store failed: {name}")
        self.behaviour = name
        self.proxy.behave(name)


def undisturbed_digest(plan: Plan, folder: Path) -> str:
    """The state in which the run ends that nothing disturbs, without a mirror."""
    training = Training(plan)
    while training.step < plan.steps:
        training.advance()
    with CheckpointManager(folder / "undisturbed") as manager:
        manager.save(training.checkpoint(0), final=True)
        return manager.inspect(plan.steps).state_digest


class Run:
    """The processes of one case."""

    def __init__(self, bench: Bench, plan: Plan, folder: Path) -> None:
        self.bench, self.plan, self.folder = bench, plan, folder
        self.writers: list[Writer] = []

    def start(self, plan: Plan | None = None) -> Writer:
        number = len(self.writers) + 1
        plan = writers.with_folder(plan or self.plan, self.folder, number)
        writer = self.bench.crew.start(plan, self.folder / f"machine-{number}")
        self.writers.append(writer)
        self.behave(self.bench.behaviour)
        return writer

    def behave(self, name: str | None) -> None:
        """Make the store fail in a way of the proxy, or work; for those that run, and those that start."""
        if name != self.bench.behaviour:
            self.bench.behave(name)
        for writer in self.writers:
            writer.misread |= name in _FALSE_DOWNLOADS and writer.running

    def finish(self) -> Writer:
        """Run to the end, with a store that works."""
        self.behave(None)
        # Without hurry: what this machine needs for other work is no fault of the store.
        plan = replace(self.plan, give_up_after=writers.HANG_SECONDS / 3, timeout=writers.HANG_SECONDS / 6)
        for _ in range(REFUSALS):
            writer = self.start(plan)
            if writer.wait() != REFUSED:
                break
        code = writer.wait()
        require(
            code == FINISHED, f"{self.folder}: the last process ended with {code}: {writer.events()[-1:]}"
        )
        return writer

    def check(self) -> None:
        """Check what every process did, and what is there; the last one had a store that works."""
        codes = [writer.wait() for writer in self.writers]
        for writer, code in zip(self.writers, codes, strict=True):
            writers.require_message(writer, code)
        case = checks.Case(self.plan.url, self.writers, codes)
        case.require_all()
        case.require_kept(self.writers[-1])


def kills(bench: Bench, case: Case) -> None:
    """One writer, killed again and again; its disk is gone each time, or each other time."""
    rng, campaign, plan = case.rng, bench.campaign, bench.plan(case)
    if rng.random() < 0.25:
        plan = replace(plan, sizes=(700_000,), part_bytes=SMALLEST_PART, steps=STEPS // 3, save_every=2)
        campaign.count("killed runs with uploads in parts")
    run = Run(bench, plan, bench.folder / f"case-{case.number}")
    expected = undisturbed_digest(run.plan, run.folder)
    for _ in range(KILLS):
        run.behave(None)
        behaviour = rng.choice([None, None, *proxy.BEHAVIOURS])
        if rng.random() < 0.2:
            run.behave(behaviour)  # from the start

        def look(writer: Writer, behaviour: str | None = behaviour) -> None:
            if bench.behaviour != behaviour and writer.event("took") is not None:
                run.behave(behaviour)

        writer, instant = writers.kill_somewhere(bench.proxy, rng, run.start, look)
        code = writer.wait()
        if instant:
            writer.wipe()
            campaign.count("kills, and the disk was wiped")
            campaign.count(f"  {instant}")
        elif code == FINISHED:
            campaign.count("runs that finished before their last kill")
            break
        else:
            writer.wipe()
            _count_end(campaign, code)
            text = f"{run.folder}: process {writer.plan.number} ended with {code}: {writer.events()[-1:]}"
            require(code in (REFUSED, FAILED), text)
    last = run.finish()
    _require_digest(run, last, expected)
    run.check()
    campaign.count("killed runs that ended in the undisturbed state")


def flaky(bench: Bench, case: Case) -> None:
    """The store fails now and then, from the first request to the last: no process notices."""
    name = FLAKY[case.number % len(FLAKY)]
    plan = replace(bench.plan(case), steps=STEPS // 5, give_up_after=writers.HANG_SECONDS / 3)
    plan = replace(plan, timeout=writers.HANG_SECONDS)
    run = Run(bench, plan, bench.folder / f"case-{case.number}")
    run.behave(name)
    writer = run.start()
    code = writer.wait()
    require(code == FINISHED, f"{run.folder}: {name}: ended with {code}: {writer.events()[-1:]}")
    run.behave(None)
    _require_digest(run, writer, undisturbed_digest(plan, run.folder))
    run.check()
    bench.campaign.count("runs that did not notice that the store failed now and then")


def several(bench: Bench, case: Case) -> None:
    """Two to five writers at once, that are killed, stopped and woken."""
    rng, campaign = case.rng, bench.campaign
    plan = replace(bench.plan(case), diverges=True, step_seconds=rng.choice([0.01, 0.03]))
    run = Run(bench, plan, bench.folder / f"case-{case.number}")
    count = rng.randint(2, 5)
    campaign.count(f"runs of {count} writers at once")
    end = time.monotonic() + rng.uniform(2, 5)
    while time.monotonic() < end:
        living = [writer for writer in run.writers if writer.running]
        if len(living) < count and len(run.writers) < 4 * count:
            take_over = rng.random() < 0.3
            run.start(replace(plan, take_over=take_over))
        elif living:
            _disturb(campaign, rng, rng.choice(living))
        if rng.random() < 0.15:
            run.behave(rng.choice([None, *proxy.BEHAVIOURS]))
        time.sleep(rng.uniform(0, 2 * PATIENCE / count))
    run.behave(None)
    for writer in run.writers:
        if writer.stopped:
            writer.send(signal.SIGCONT)
        _count_end(campaign, writer.wait())
    run.finish()
    run.check()
    campaign.count("runs of several writers in whose state nothing of a replaced one was")


def _disturb(campaign: Campaign, rng: random.Random, writer: Writer) -> None:
    if writer.stopped:
        campaign.count("SIGCONT")
        writer.send(signal.SIGCONT)
    elif rng.random() < 0.7:
        campaign.count("SIGSTOP")
        writer.send(signal.SIGSTOP)
    else:
        campaign.count("kills, and the disk was wiped")
        campaign.count("  one of several writers")
        writer.send(signal.SIGKILL)
        writer.wait()
        writer.wipe()


def damage(bench: Bench, case: Case) -> None:
    """Objects are flipped and truncated between the processes."""
    rng, campaign = case.rng, bench.campaign
    plan = replace(bench.plan(case), keep_there=4)
    run = Run(bench, plan, bench.folder / f"case-{case.number}")
    expected, client = undisturbed_digest(plan, run.folder), checks.open_store(plan.url)
    damaged: set[str] = set()
    for _ in range(KILLS // 3):
        run.behave(None)
        writer, instant = writers.kill_somewhere(bench.proxy, rng, run.start)
        writer.wipe()
        if not instant:
            break
        campaign.count("kills, and the disk was wiped")
        files = sorted(
            (file for info in client.list() if (file := parse_key(info))), key=lambda file: file.step
        )
        for file in files[-rng.randint(1, 2) :]:
            if file.step == plan.steps or len(files) - len(damaged & {one.key for one in files}) < 2:
                continue  # a final state that is damaged, or no intact one, is a loss that nobody can mend
            content = bytes(client.read(file.key, 0, file.size) or b"")
            if rng.random() < 0.5:
                content = proxy.flip_bit(content, rng.randrange(len(content)), rng.randrange(8))
                campaign.count("objects with a flipped bit")
            else:
                content = content[: rng.randrange(len(content))]
                campaign.count("truncated objects")
            client.put(file.key, content)
            damaged.add(file.key)
    last = run.finish()
    _require_digest(run, last, expected)
    campaign.count("damaged runs that ended in the undisturbed state")


def late(bench: Bench, case: Case) -> None:
    """An upload of a writer is under way while another one takes over, and arrives afterwards."""
    rng, campaign = case.rng, bench.campaign
    plan = replace(bench.plan(case), diverges=True)
    run = Run(bench, plan, bench.folder / f"case-{case.number}")
    run.behave(None)
    first, steps = run.start(), rng.randint(1, 20)
    _wait(first, lambda: len(first.events("mirrored")) >= steps)
    sent = bench.proxy.counts[proxy.LATE]
    run.behave("an upload late")
    _wait(first, lambda: bench.proxy.counts[proxy.LATE] > sent)
    number = rng.choice([signal.SIGSTOP, signal.SIGKILL])
    first.send(number)
    with KillAt(bench.proxy, rng.choice(["term", "upload"]), "done", 1) as killing:
        killing.writer = second = run.start()
        second.wait()
    run.behave(None)
    if rng.random() < 0.5:  # else it arrives while the third one begins
        time.sleep(rng.uniform(0, 2 * PATIENCE))
    run.finish()
    if first.stopped:
        first.send(signal.SIGCONT)
        require(
            first.wait() == REPLACED, f"{run.folder}: the first process was not told that it was replaced"
        )
    run.check()
    campaign.count("uploads that arrived after another process had taken over")


def _wait(writer: Writer, condition: Callable[[], bool]) -> None:
    while writer.running and not condition():
        time.sleep(writers.POLL_SECONDS)


def outage(bench: Bench, case: Case) -> None:
    """The store is away for hours while one writer trains; afterwards everything is there."""
    rng, campaign = case.rng, bench.campaign
    hours = rng.uniform(0.5, 3)
    seconds = 3600 * hours * PATIENCE_IN_OUTAGES / 60
    plan = bench.plan(case)
    plan = replace(plan, patience=PATIENCE_IN_OUTAGES, step_seconds=seconds / STEPS / 2, timeout=2 * seconds)
    run = Run(bench, plan, bench.folder / f"case-{case.number}")
    expected = undisturbed_digest(plan, run.folder)
    writer = run.start()
    _wait(writer, lambda: writer.event("mirrored") is not None)
    run.behave(rng.choice(sorted(_DEAD)))
    end = time.monotonic() + seconds
    _wait(writer, lambda: time.monotonic() > end)
    run.behave(None)
    code = writer.wait()
    require(code == FINISHED, f"{run.folder}: ended with {code} after an outage: {writer.events()[-1:]}")
    steps = [event.values["step"] for event in writer.events("mirrored")]
    require(STEPS in steps, f"{run.folder}: the final checkpoint was not mirrored after an outage")
    _require_digest(run, writer, expected)
    run.check()
    writer.wipe()
    _require_digest(run, run.finish(), expected)
    run.check()
    campaign.count("outages")
    campaign.count("  minutes in all, at the scale of the times", round(60 * hours))


def trainer(bench: Bench, case: Case) -> None:
    """The real trainer, killed; each machine begins with an empty disk."""
    rng, campaign = case.rng, bench.campaign
    folder, url = bench.folder / f"case-{case.number}", bench.store.fresh_url()
    launcher = bench.crew.trainer()
    expected = training_run.reference_digest(launcher, tuple(training_run.TRAINING))
    bench.behave(None)
    options = [*training_run.TRAINING, "--save-every", "2", "--mirror", url, "--take-over"]
    for number in range(1, TRAINER_KILLS + 1):
        training = training_run.TrainingRun(folder / f"machine-{number}", options, launcher)
        trigger = triggers.once_printed("step ", rng.randint(4, 24))
        _, code = training.disturb(signal.SIGKILL, trigger, rng.uniform(0, 0.1))
        require(code in (0, -signal.SIGKILL), f"{training.out}: exit code {code}")
        campaign.count("kills of the real trainer, and the disk was wiped", int(code != 0))
        shutil.rmtree(training.out)
    last = training_run.TrainingRun(folder / "last", options, launcher)
    require(last.finish() == expected, f"{last.out}: ended in another state than the undisturbed run")
    campaign.count("runs of the real trainer that ended in the undisturbed state")


def _require_digest(run: Run, writer: Writer, expected: str) -> None:
    finished = writer.event("finished")
    same = finished is not None and finished.values["digest"] == expected
    require(same, f"{run.folder}: ended in another state than the undisturbed run")


def _count_end(campaign: Campaign, code: int) -> None:
    texts = {
        REFUSED: "processes that were refused: another one lives",
        REPLACED: "processes that were told that they were replaced",
        FAILED: "processes that the store kept from starting, and that said so",
        FINISHED: "processes that finished beside others",
    }
    if code in texts:
        campaign.count(texts[code])


#: By name; cheap and important ones come more often.
CASES: dict[str, Callable[[Bench, Case], None]] = {
    "kills": kills,
    "several": several,
    "late": late,
    "flaky": flaky,
    "damage": damage,
    "outage": outage,
    "trainer": trainer,
}
CYCLE = (
    "kills", "late", "several", "flaky", "kills", "damage", "several", "kills", "late", "outage", "flaky",
    "trainer",
)  # fmt: skip


def run_case(bench: Bench, case: Case, only: str | None) -> None:
    """Run one case; its folder stays after a counterexample."""
    name = only or CYCLE[case.number % len(CYCLE)]
    CASES[name](bench, case)
    shutil.rmtree(bench.folder / f"case-{case.number}", ignore_errors=True)
