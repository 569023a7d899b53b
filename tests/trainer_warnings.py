"""Warnings of the Trainer's own libraries: a module of tests imports ``pytestmark``."""

from __future__ import annotations

import pytest

#: peft, of the model; torch, for lack of a GPU to copy to.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.:UserWarning"),
]
