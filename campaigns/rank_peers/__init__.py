"""The same accidents with the ranks of other trainers: DDP with the Trainer, with accelerate, and with DCP.

    python -m campaigns.rank_peers --rounds 10 --markdown rank_peers.md
    python -m campaigns.rank_peers --peers 'DCP|distrust' --rounds 2

Each trains the same small model, in batches of the same size, as its documentation shows. A run must end with
the losses and weights of its undisturbed run, bit for bit. What ours loses is a counterexample.
"""
