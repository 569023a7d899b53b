"""Long runs: twenty thousand saves in one process, and nothing grows.

Three runs (saves, many checkpoints, training), each in a process that is sampled now and then (``growth``).
``--case N`` makes all saves up to that one: growth is never due to a single save.

  python -m campaigns.long_run --only saves --cases 2000 --picture long_run.png
  python -m campaigns.long_run --only saves --cases 1000 --fault descriptors    # it must be found
"""
