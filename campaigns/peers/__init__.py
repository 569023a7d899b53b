"""The same accidents with other savers, in the same terms, by the same code.

    python -m campaigns.peers --peers 'torch|DCP' --accidents flipped --rounds 5
    python -m campaigns.peers --markdown peers.md --picture peers.png --log peers.jsonl

A *cell* is a saver and an accident. A trial damages the newer of two checkpoints, or kills a save, and
resumes as the saver documents. The values that come back decide the outcome. What ours loses is a
counterexample.
"""
