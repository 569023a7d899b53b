"""The kinds of case of ``campaigns.failing_disks``: small file systems, and what happens to them."""
