"""Hostile files: every answer is an error of the library or a valid checkpoint, in bounded time and memory.

The files are forged: made of real checkpoints by changes that a reader could fall for, with correct digests,
so that the checks behind the digests are reached (``forging``). ``invariants``, ``readers`` and
``converting`` say what must hold for every answer. The cases:

- each family of files by name (``families``), then things that are no files in the place of one;
- each family of checkpoints in the older formats (``older``), with correct checksums and with wrong ones;
- the permissions of what a save leaves, under four umasks;
- each family of expensive files (``growing``), in three sizes: time that grows no faster than the file, and
  memory that is proven by a limit (``costs``). A damaged file is refused with no memory beyond the file's own
  size; a forged one takes what Python's objects take, and no more than a fixed multiple;
- each family of corrupted folders of other programs (``imports``), which are converted and resumed from, in a
  process for each engine (``training``);
- then, for the rest of the time, a hundred random files in each case, some of them through real files; one
  case in four has folders of other programs.

All but the expensive files and the folders are read in one process that may take 64 MiB beyond what it had
when it began. With ``--engine guided`` libFuzzer leads the mutations instead, by the lines of the reader that
they reach; it needs ``pip install atheris``, and its finding is kept as a file, for ``--replay``. Memory is
limited and measured by means of Linux.

families      changes that a reader could fall for, and complete files
growing       files that cost more than their size suggests
older         the same for the older formats
forging       forged files with correct digests, and the real ones that they are made of
corruptions   what can happen to any file
invariants    what must hold for every answer
readers       the methods to read a file, and what must hold for each
converting    what must hold for what is converted
imports       folders of other programs, and what happens to them
training      the processes that convert them and resume from the result
costs         time and memory, measured and limited
guided        the coverage-guided engine
obstacles     things that are no files, in the place of one; permissions

    python -m campaigns.fuzz --seed 1 --seconds 600
    python -m campaigns.fuzz --seed 1 --case 7
    python -m campaigns.fuzz --engine guided --seconds 600
    python -m campaigns.fuzz --replay counterexample.safetensors
"""
