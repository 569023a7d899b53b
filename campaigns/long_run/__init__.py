"""Long runs: twenty thousand saves in one process, and nothing grows.

Three runs, each in a process of its own that is asked now and then for its resident memory, the blocks that
Python has allocated, its open descriptors and its threads (``growth``), and for how long a save took:

saves      saves of a small state, blocking and in the background, with retention by number and by metric
many       a directory that keeps a thousand checkpoints: how does a save slow down with their number?
training   the trainer on an engine of numpy, with a save every second step

The numbers of descriptors and threads must not change; memory may differ by ``MEMORY_BOUND`` between the
second quarter and the last one, and Python's blocks by ``BLOCKS_BOUND``; a save may take
``LATENCY_BOUND`` times as long at the end as at the start, in medians of windows, unless the disk itself
slowed down.

A case is a save of the first run, and ``--case N`` makes all of them up to that one: growth is never due to
a single save.

examples:
  python -m campaigns.long_run
  python -m campaigns.long_run --only saves --cases 2000 --picture long_run.png
  python -m campaigns.long_run --only training --steps 10000
  python -m campaigns.long_run --only saves --cases 1000 --fault descriptors    # it must be found
"""
