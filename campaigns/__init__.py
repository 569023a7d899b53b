"""Is anything ever lost? Each module is a campaign, and a command: ``python -m campaigns.power_loss --help``.

power_loss     every disk that a power cut may leave
kills          SIGKILL at random instants of a real training run
killed_saves   SIGKILL at random instants of a process that does nothing but save
signals        every signal that asks a real training run to stop, in every phase of it
damage         every bit flipped, every length, every byte, of a real checkpoint
failing_disks  disks that are full, taken away, or fail
crowds         many writers, readers, forks and signals at once
hostile        files made to hurt who reads them
long_run       twenty thousand saves in one process
peers          what other savers make of the same accidents

campaign       what they share: cases by number, counts, the first counterexample
"""
