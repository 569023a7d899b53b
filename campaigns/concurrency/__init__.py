"""Many at once: writers, readers, forks and copies in one directory of checkpoints.

A case's number decides which part it is, in the order of ``CYCLE``; ``--only`` skips the others. The machine
decides who wins a race, so a finding that depends on that may need a few repetitions.

  python -m campaigns.concurrency --only readers --saves 1000 --path direct --cases 20
  python -m campaigns.concurrency --only races --cases 20 --fault no-lock    # it must be found
"""
