"""The engine on torch, transformers and peft: CPU, CUDA and MPS by the same code."""

import logging
import os

# OpenMP reads this when torch is first imported, so it is set before any module of this folder is. By default
# each thread spins for milliseconds at the end of every operation: where another process needs the same
# cores, small models then run ten times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

# peft imports bitsandbytes wherever it is installed, which then logs about missing kernels in every run, and
# with quantized weights at every step.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
