"""What other savers make of the accidents that ours are tried with, in the same terms, by the same code.

    python -m campaigns.peers                       # every saver, every accident: half an hour
    python -m campaigns.peers --peers 'torch|DCP' --accidents flipped --rounds 5
    python -m campaigns.peers --markdown peers.md --picture peers.png --log peers.jsonl
    python -m campaigns.peers --seed 1 --case 17    # one trial once more

A *cell* is a saver and an accident. A trial of damage takes a copy of a directory with two checkpoints, does
something to the files of the newer one, and has the saver go on by its own documented means, in a process
that may crash. A trial of a kill has a process save step after step, kills it with SIGKILL at a random
instant of one of them, and goes on from what is left. What came of it is told by what comes back, tensor by
tensor, and not by what the saver says: see ``outcomes``. A trainer goes on training, and has to end where a
run that was left alone ends, bit for bit.

Whatever the peers lose is counted. What ours lose is a counterexample, and ends the campaign.

outcomes      the terms, and how a trial is sorted into them
accidents     what is done to files
subjects      the savers of arrays       } one interface: write, resume, expected
trainers      the trainers               }
all_subjects  all of them, and their versions
state         what the savers of arrays save
worker        the process in which a saver writes and goes on
processes     the warm process, and the one that is killed
trials        one trial
results       the counts, as a table
picture       the counts, as a picture
"""
