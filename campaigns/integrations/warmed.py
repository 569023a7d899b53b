"""Importing this does what each process does once, for the fork server: a third of a short run."""

import functools

from accelerate.utils import imports
from peft import get_peft_model

from campaigns.integrations import trainers

# A Trainer asks some thirty times what is installed, and each answer reads the metadata again.
imports._is_package_available = functools.cache(imports._is_package_available)
get_peft_model(trainers.causal_model(), trainers.adapter())
