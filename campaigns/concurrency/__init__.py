"""Many at once: writers, readers, forks and copies in one directory of checkpoints.

races      processes that start at the same instant and want the same directory; the holder is killed
trainers   the same training command twice at the same instant
orphans    a writer that is killed while a child lives that it forked, or whose child ends while it writes
readers    processes that list, load and verify what another saves, replaces and cleans up
programs   random programs over managers, their copies, clones, forks and threads, against a model

A case's number decides which of them it is, in the order of ``CYCLE``: with ``--only``, the numbers of others
are passed over. Who wins a race is for the machine to say: a counterexample that hangs on that may take a few
tries to be seen again.

examples:
  python -m campaigns.concurrency --seconds 600
  python -m campaigns.concurrency --only readers --saves 1000 --path direct --cases 20
  python -m campaigns.concurrency --only programs --seconds 600 --seed 7
  python -m campaigns.concurrency --only races --cases 20 --fault no-lock    # it has to be found
"""
