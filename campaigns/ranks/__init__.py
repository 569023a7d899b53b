"""Ranks that are killed, stopped and cut off while they train one run together.

    python -m campaigns.ranks --seed 1 --cases 30
    python -m campaigns.ranks --seed 1 --cases 3 --only 'SIGKILL|lost'

A case is one run. Each attempt at it is the same command on another number of ranks, on one machine or on
two network namespaces, with the launcher or without, until an accident ends it at a random instant. Then
every listed checkpoint is intact, the other ranks have ended within the bound, no process is left, and the
exit codes say what happened. The finished run has the state digest and the metrics of one undisturbed
process. Ranks are forks of one process that has its imports done; every twentieth case starts new
interpreters.
"""
