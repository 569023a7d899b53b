"""The checkpoint core: a library of its own, for people who train with something else too.

It imports the standard library, numpy and the digest library, and no framework.
"""

from __future__ import annotations

from distrust.checkpoint.checkpoint import Checkpoint
from distrust.checkpoint.manager import CheckpointManager
from distrust.checkpoint.store import CheckpointFile, DamagedFile, Scan
from distrust.checkpoint.writer import PendingSave

__all__ = ["Checkpoint", "CheckpointFile", "CheckpointManager", "DamagedFile", "PendingSave", "Scan"]
