"""Campaigns that look for a lost checkpoint. Each is a command: ``python -m campaigns.power_loss --help``.

All of them in turn: ``python -m campaigns --seconds 60``.

power_loss     every disk state that a power cut may leave
failing_calls  every call of the commit protocol fails, once or from then on; then a power cut
killed_saves   SIGKILL at random instants of a process that only saves
kills          SIGKILL at random instants of a real training run
signals        every signal that asks a real training run to stop, in every phase of it
damage         every bit flipped, every length, every byte, of a real checkpoint
failing_disks  disks that are full, removed, or fail; ``disks`` holds the kinds of case
concurrency    many writers, readers and forks at once
fuzz           files made to hurt their reader
long_run       twenty thousand saves in one process
peers          the same accidents, with other savers

campaign       cases by number, counts, the first counterexample
child          child processes: spawned modules, forked functions
session        commands that are watched and signalled
oracle         what retention must keep, independent of the product
invariants     what must hold in a directory of checkpoints
training_run   training runs that are disturbed: the real command and the toy engine
triggers       when to send a signal
power          a disk that records, and what a power cut may leave of it
walk           the program that ``killed_saves`` kills
corruptions    what can happen to a file
faults         the product broken on purpose: what a campaign has to find
"""
