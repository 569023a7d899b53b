"""Data: sources -> records -> tokens -> order -> batches, each a small module, none of them with a framework.

problems.py    how wrong records are told: all at once, with file, line and field
records.py     what one line of a source says
sources.py     a JSON Lines file -> records, every line checked
tokenizer.py   the contract: what is needed of a tokenizer
segments.py    a record -> stretches of text, learned or only read
tokens.py      records -> corpus
corpus.py      the tokenized examples, and their fingerprint
order.py       (seed, epoch) -> the order of an epoch
sequences.py   which examples share a row: packing
batches.py     step -> the arrays of its micro-batches
"""

from distrust.data.batches import IGNORED, Batches, MicroBatch, evaluation_batches
from distrust.data.corpus import Corpus
from distrust.data.order import MAX_SEED, Order, permutation
from distrust.data.records import Completion, Conversation, Location, Message, Record, Text
from distrust.data.sequences import Sequences, packed, single
from distrust.data.sources import read_records
from distrust.data.tokenizer import Tokenizer
from distrust.data.tokens import beginning, tokenize

__all__ = [
    "IGNORED",
    "MAX_SEED",
    "Batches",
    "Completion",
    "Conversation",
    "Corpus",
    "Location",
    "Message",
    "MicroBatch",
    "Order",
    "Record",
    "Sequences",
    "Text",
    "Tokenizer",
    "beginning",
    "evaluation_batches",
    "packed",
    "permutation",
    "read_records",
    "single",
    "tokenize",
]
