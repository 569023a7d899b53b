"""SIGKILL at random instants of trainers of other libraries that keep their checkpoints with ours.

    python -m campaigns.integrations --seed 1 --cases 40 --markdown integrations.md
    python -m campaigns.integrations --subjects 'SFT|mlx' --cases 5 --ours-only

Each run is killed several times and started again until it ends. It must end as an undisturbed one does: in
the same weights, moments, generators, logs and mean loss. The Trainer's own resume gets the same kills, and
is counted in the same terms. The scripts of ``examples/`` are compared by their last line, and by the weights
and moments of their last checkpoint.
"""
