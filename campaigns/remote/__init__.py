"""Runs whose machines do not come back, whose store fails, and that several processes want to continue.

    python -m campaigns.remote --seed 1 --cases 30
    python -m campaigns.remote --seed 1 --cases 3 --only several
    python -m campaigns.remote --fault no-base --seconds 60     # it must be found

A case is one run of a toy training that mirrors its checkpoints to SeaweedFS, a real S3 server on this
machine, through a proxy that fails in the ways of a store. Its processes are killed at every stage of an
upload, a term and a download, and their disks are wiped; two to five of them run at once, are stopped and
woken; objects are flipped and truncated; the store is away for hours, at a scale at which the patience of a
minute takes a quarter of a second or less. The run must end in the state of the undisturbed one; nothing that
a replaced process wrote is ever resumed from; a replaced process is told so; and every object that counts
verifies.
"""
