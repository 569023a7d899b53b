"""The kinds of case of ``campaigns.failing_disks``: small file systems, and what happens to them.

isolated      one case in a process of its own, with its own mounts and limits
volumes       small file systems in a private mount namespace, and what fills them
save_checker  saves into a directory, and what must hold after each
resources     disks, inodes, quotas, the process's own limits; devices that fail
directories   a directory that is removed, replaced, write protected or mounted over
runs          the trainer's loop, and the command ``distrust train``, on such disks
"""
