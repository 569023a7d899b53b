"""Importing this builds what each process builds once, for the fork server: a third of a short run."""

from peft import get_peft_model

from campaigns.integrations import trainers

get_peft_model(trainers.causal_model(), trainers.adapter())
