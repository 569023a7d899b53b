"""Checkpoints in object stores (S3, GCS, Azure), or in a second folder: see ``docs/remote.md``.

Importing this package loads no client: ``client.connect`` needs the extra ``[remote]``.
"""
