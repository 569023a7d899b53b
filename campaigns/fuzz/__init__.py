"""Hostile files: every answer is an error of the library or a valid checkpoint, in bounded time and memory.

The first cases are every family of files by name, of older formats, of permissions, of expensive files, of
other programs' folders, of links at the names of each command, of data and logs, and of model folders. Then
come random ones of each in turn. With
``--engine guided`` (pip install atheris) libFuzzer leads the mutations; ``--replay`` reads its finding again.

    python -m campaigns.fuzz --seed 1 --seconds 600
"""
