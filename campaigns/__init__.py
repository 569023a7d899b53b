"""Is anything ever lost? Each module is a campaign, and a command: ``python -m campaigns.power_loss --help``.

All of them in turn: ``python -m campaigns --seconds 60``.

power_loss     every disk that a power cut may leave
failing_calls  every call of the commit protocol fails, once or from then on; and then a power cut
killed_saves   SIGKILL at random instants of a process that does nothing but save
kills          SIGKILL at random instants of a real training run
signals        every signal that asks a real training run to stop, in every phase of it
damage         every bit flipped, every length, every byte, of a real checkpoint
failing_disks  disks that are full, taken away, or fail; ``disks`` has what goes wrong
crowds         many writers, readers and forks at once
hostile        files made to hurt who reads them
long_run       twenty thousand saves in one process
peers          what other savers make of the same accidents

campaign       what they share: cases by number, counts, the first counterexample
recording, power_cut      a disk that keeps a record, and what a cut may leave of it
processes, training_run, saving, fork_server, instants, witness, aftermath      what is killed, and when
injuries                  what is done to a file
faults                    the product broken on purpose: what a campaign has to find
"""
