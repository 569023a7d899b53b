"""Is training on a GPU exact, and how fast is it? ``python -m benchmarks.gpu``."""
