"""Hostile files: every answer is an error of the library or a good checkpoint, in bounded time and memory.

The files are forged: made of real checkpoints by changes that a reader could fall for, and given digests
that are right, so that the checks behind the digests are reached (``forging``). What is promised
of every answer is said in ``promises``, ``readers`` and ``converting``. The cases:

- each family of files by name (``families``), then things that are no files in the place of one;
- each family of checkpoints in the older formats (``older``), with checksums that are right and that lie;
- what a save leaves for others to read, under four umasks;
- each family that is made to cost more than it looks, in three sizes: time that does not grow faster than the
  file, and memory that is proven by a limit (``costs``). What was only damaged is refused with
  nothing taken beyond the file's own size; what is forged takes what Python's objects take, and no more than
  a fixed multiple;
- each family of harm to folders of other programs (``elsewhere``), which are converted and gone on with, in a
  process for each engine (``training``);
- then, for as long as it is told, a hundred drawn at random in each case, some of them through real files;
  one case of four is of folders of other programs.

All but the sizes and the folders are read in one process that may take 64 MiB beyond what it had when it
began. With ``--engine guided`` libFuzzer leads the mutations instead, by the lines of the reader that they
reach; it needs ``pip install atheris``, and its finding is kept as a file, to be read again with
``--replay``. Memory is limited and measured by means of Linux.

families      changes that a reader could fall for, and files that cost more than they look
older         the same for the formats that were before ours
forging       gives a forged file the digests that are right
specimens     the real checkpoints that they are made of
harm          what can be done to any file
promises      what is promised of every answer
readers       the ways to read a file, and what is promised of each
converting    what is promised of what is converted
elsewhere     folders of other programs, and what is done to them
training      the processes that convert them and go on with them
costs, sizes  time and memory, measured and limited
worker        the process that reads, watched by another
guided        the coverage-guided engine
obstacles     what is no file, in the place of one
permissions   what a save leaves for others to read

    python -m campaigns.fuzz --seed 1 --seconds 600
    python -m campaigns.fuzz --seed 1 --case 7
    python -m campaigns.fuzz --engine guided --seconds 600
    python -m campaigns.fuzz --replay counterexample.safetensors
"""
