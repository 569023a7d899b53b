"""The engine on torch, transformers and peft: CPU, CUDA and MPS by the same code."""
