"""The kinds of case of ``campaigns.failing_disks``: small file systems, and what happens to them.

isolated      one case in a process of its own, with its own mounts and limits
volumes       small file systems in a private mount namespace, and what fills them
save_checker  saves into a directory, and what must hold after each
full          disks, inodes and quotas that are used up
limits        the process's own limits: file size, open files, memory
directories   a directory that is removed, replaced, write protected or mounted over
devices       a block device that fails
runs          the trainer's loop, and the command ``distrust train``, on such disks
"""
