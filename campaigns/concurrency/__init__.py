"""Many at once: writers, readers, forks and copies in one directory of checkpoints.

races      processes that want the same directory at the same instant; the holder is killed
trainers   the same training command twice at the same instant
orphans    a writer that is killed while a forked child lives, or whose child ends while it writes
readers    processes that list, load and verify what another one saves, replaces and cleans up
programs   random programs over managers, their copies, clones, forks and threads, against a model

A case's number decides which of them it is, in the order of ``CYCLE``; ``--only`` passes over the others. The
machine decides who wins a race, so a finding that depends on that may need a few repetitions.

examples:
  python -m campaigns.concurrency --seconds 600
  python -m campaigns.concurrency --only readers --saves 1000 --path direct --cases 20
  python -m campaigns.concurrency --only programs --seconds 600 --seed 7
  python -m campaigns.concurrency --only races --cases 20 --fault no-lock    # it must be found
"""
