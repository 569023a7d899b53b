"""The engine on mlx and mlx-lm: Apple's GPUs, CUDA and CPU by the same code."""
