"""Our checkpoints compared with other libraries and with the hardware: ``python -m benchmarks.checkpoints``.

states      what is saved, and how it is generated
libraries   how each library saves and loads
trainer     transformers' own saving
limits      what the hardware can do
commands    `distrust ls`
cases       all of it as named cases; each runs once in a fresh process (child)
driver      the order of the cases and their folders
results     medians, and ratios within a repeat
operations  which rows are compared with which limit, and the targets
tables, picture
stall       what saving costs a training run: ``python -m benchmarks.stall``
remote      what a mirror costs: ``python -m benchmarks.remote``
"""
