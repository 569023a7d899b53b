"""The engine on torch, transformers and peft: CPU, CUDA and MPS by the same code."""

import logging
import os

# Read by OpenMP when torch is first imported, so it stands before every module here. By default each thread
# spins for milliseconds at the end of every operation; where another process wants the same cores, small
# models then run ten times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

# Where bitsandbytes is installed, peft imports it in any run, and it logs of kernels it lacks; with quantized
# weights, at each step, of its arithmetic.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
