"""Importing this disables fsync, for processes that are killed: only a power cut loses what is not synced."""

import os

os.fsync = lambda fd: None
