"""Hostile files: every answer is an error of the library or a valid checkpoint, in bounded time and memory.

The first cases are every family of files by name, of older formats, of permissions, of expensive files and of
other programs' folders; then each case has a hundred random files, and one in four such folders. With
``--engine guided`` (pip install atheris) libFuzzer leads the mutations; ``--replay`` reads its finding again.

    python -m campaigns.fuzz --seed 1 --seconds 600
"""
