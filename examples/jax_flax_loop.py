"""Exact resume of a training loop of your own, in jax with flax and optax: kill it, and run it again.

python examples/jax_flax_loop.py [FOLDER]
"""

import hashlib
import sys
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from distrust import Checkpoint, CheckpointManager
from distrust.errors import CheckpointNotFound
from distrust.integrations.random import generators, set_generators


@nnx.jit  # type: ignore[untyped-decorator]
def train_step(model: Any, optimizer: Any, rows: jax.Array, key: jax.Array) -> None:
    """One step towards the sum of each row, with noise."""
    noisy = rows + 0.1 * jax.random.normal(key, rows.shape)

    def loss(model: Any) -> Any:
        return ((model(noisy) - rows.sum(axis=1, keepdims=True)) ** 2).mean()

    optimizer.update(model, nnx.grad(loss)(model))


rows = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
model = nnx.Sequential(nnx.Linear(8, 32, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(32, 1, rngs=nnx.Rngs(1)))
optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)
np.random.seed(0)  # its generator draws the order of each epoch
key, epoch, step, order = jax.random.key(0), generators(), 0, None
with CheckpointManager(sys.argv[1] if len(sys.argv) > 1 else "runs/jax", keep_last=2) as manager:
    try:
        saved = manager.load_latest(framework="jax")
    except CheckpointNotFound:
        print("a new run")
    else:
        nnx.update(model, saved.model)
        nnx.update(optimizer, saved.optimizer)
        key, epoch, step = jax.random.wrap_key_data(saved.rng["key"]), saved.rng["epoch"], saved.step
        print(f"resuming after step {step}")
    while step < 60:
        if order is None:
            set_generators(epoch)  # as the epoch began: at a resume, the same order is drawn again
            order = np.random.permutation(60).reshape(15, 4)
        key, noise = jax.random.split(key)
        train_step(model, optimizer, rows[order[step % 15]], noise)
        step += 1
        if step % 15 == 0:
            epoch, order = generators(), None  # an epoch's end is the next one's beginning
        if step % 7 == 0 or step == 60:
            rng = {"key": jax.random.key_data(key), "epoch": epoch}
            state = [nnx.to_pure_dict(nnx.state(part)) for part in (model, optimizer)]
            manager.save_async(Checkpoint(step=step, model=state[0], optimizer=state[1], rng=rng))
weights = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(nnx.state(model)))
print(f"finished at step {step}: weights {hashlib.sha256(weights).hexdigest()}")
