"""Safe, exact checkpoints inside trainers of other libraries: one module per library, loaded only on request.

These modules stand on the checkpoint core alone; neither the options nor the training loop of this package is
loaded.
"""
