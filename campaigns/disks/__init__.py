"""The kinds of case of ``campaigns.failing_disks``: small file systems, and what happens to them.

volumes       one case in a process of its own, with small file systems in a private mount namespace
save_checker  saves into a directory, and what must hold after each
resources     disks, inodes, quotas, the process's own limits; devices that fail
directories   a directory that is removed, replaced, write protected or mounted over
runs          the trainer's loop, and the command ``distrust train``, on such disks
"""
