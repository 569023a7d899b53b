"""The same accidents with other savers, in the same terms, by the same code.

    python -m campaigns.peers                       # every saver, every accident: half an hour
    python -m campaigns.peers --peers 'torch|DCP' --accidents flipped --rounds 5
    python -m campaigns.peers --markdown peers.md --picture peers.png --log peers.jsonl
    python -m campaigns.peers --seed 1 --case 17    # one trial once more

A *cell* is a saver and an accident. A trial of damage takes a copy of a directory with two checkpoints,
damages the files of the newer one, and lets the saver resume as it documents, in a process that may crash. A
trial of a kill lets a process save step after step, kills it with SIGKILL at a random instant of a save, and
resumes from what is left. The outcome is decided by the values that come back, tensor by tensor, and not by
what the saver prints (``outcomes``). A trainer continues training, and must end where an undisturbed run
ends, bit for bit.

What the peers lose is counted. What ours loses is a counterexample, and ends the campaign. The savers here
are used as their documentation shows, without the added syncs and options of ``benchmarks/libraries.py``.

outcomes      the terms, and how a trial is classified
accidents     what happens to files
subjects      the savers of arrays       } one interface: write, resume, expected
trainers      the trainers               }
all_subjects  all of them, and their versions
worker        the process in which a saver writes and resumes
processes     the warm process, and the one that is killed
trials        one trial
report        the counts, as a table and as a picture
"""
