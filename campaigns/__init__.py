"""Campaigns that look for a lost checkpoint; docs/reliability.md explains each and what it found.

Each is a command: ``python -m campaigns.power_loss --help``. ``python -m campaigns`` runs all of them but
``peers`` and ``rank_peers``. The frame of each is ``campaign``; ``oracle`` and ``invariants`` say what must
hold; ``child`` and ``session`` run processes, ``triggers`` choose when to signal them, ``faults`` break the
product on purpose.
"""
