"""All savers, in the order of the tables: ours, then those that save the same thing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterable

from campaigns.peers.subjects import STORES, Subject
from campaigns.peers.trainers import DistrustTraining, Trainer

SUBJECTS: tuple[Subject, ...] = (*STORES, DistrustTraining(), Trainer())


def find_subject(name: str) -> Subject:
    (subject,) = (subject for subject in SUBJECTS if subject.name == name)
    return subject


def missing_modules(subject: Subject) -> list[str]:
    return [module for module in subject.modules if not _is_installed(module)]


def versions(subjects: Iterable[Subject]) -> dict[str, str]:
    """Package -> version, of all that are tried."""
    packages = {package: None for subject in subjects for package in subject.packages}
    return {package: importlib.metadata.version(package) for package in packages}


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is not installed
        return False
