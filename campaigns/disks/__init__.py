"""The parts of ``campaigns.failing_disks``: disks of a few MiB, what happens to them, and who looks on.

apart        one case in a process of its own, which takes its mounts and limits with it
volumes      small file systems in a private mount namespace, and what fills them
witness      what stands in a directory of checkpoints, and whether a save kept its promises
full         disks, inodes and quotas that are used up
limits       the process's own limits: file size, open files, memory
directories  a directory that is removed, replaced, write protected or mounted over
devices      a block device that fails
toy_runs     the trainer's loop on such disks
real_runs    the command ``distrust train`` on one that fills up
"""
