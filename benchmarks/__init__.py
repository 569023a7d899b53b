"""Our checkpoints beside the peers and beside what the hardware can do: ``python -m benchmarks.checkpoints``.

states      what is saved, and how it is made
libraries   how each library saves and loads
trainer     transformers' own saving
limits      what the hardware can do
commands    `distrust ls`
cases       all of it as named cases; each runs once in a fresh process (child)
driver      which case runs when, and in which folder
results     medians, and ratios within a repeat
operations  which rows stand beside which limit, and the targets
tables, picture
stall       what saving costs a training run: ``python -m benchmarks.stall``
"""
