"""Data: sources -> records -> tokens -> order -> batches, each a small module, none of them with a framework.

problems.py    how wrong records are told: all at once, with file, line and field
records.py     what one record of a source says
mapping.py     which columns hold what
fields.py      a record's fields -> what is learned of it, and what its source is worth
formats.py     bytes -> rows: JSON Lines, JSON, CSV, Parquet
hub.py         data sets of the hub -> rows
spool.py       what can be read only once -> a file
sources.py     what a config names -> files and tables, each with a digest of its content
reading.py     sources -> records, every one checked
tokenizer.py   the contract: what is needed of a tokenizer
segments.py    a record -> stretches of text, learned or only read
tokens.py      records -> corpus
corpus.py      the tokenized examples, and their fingerprint
distribution.py  what its examples weigh, in short
cache.py       a corpus on disk: made once, verified at each start, mapped
split.py       corpus -> what is trained on and what is kept out to evaluate on
order.py       (seed, epoch) -> the order of an epoch
sequences.py   which examples share a row: packing
batches.py     step -> the arrays of its micro-batches
distribution.py  weights -> what is shown of them
table.py       the user's table -> what the ingredients of w and H count for
evidence.py    a record's fields and a table -> its w and H
weighing.py    sources -> the w and H of each record, computed or checked
rewriting.py   weighed records -> a data set with both columns
"""

from distrust.data.batches import IGNORED, Batches, MicroBatch, evaluation_batches
from distrust.data.cache import Cache, cache_folder
from distrust.data.columns import Columns, columns_of
from distrust.data.corpus import Corpus, split_off
from distrust.data.distribution import Distribution, summarize_weights
from distrust.data.fields import NO_CLASS
from distrust.data.packing import PackedRows, concatenate, one_per_row, pack
from distrust.data.reading import DatasetStats, RecordReader, check_records, read_records
from distrust.data.records import Completion, Conversation, Location, Message, Record, Text
from distrust.data.sampler import MAX_SEED, EpochSampler, MixtureSampler, permutation
from distrust.data.sources import Source, examples_source, open_source
from distrust.data.tokenizer import Tokenizer, digest_tokenizer
from distrust.data.tokenizing import bos_prefix, tokenize, tokenize_in_blocks

__all__ = [
    "IGNORED",
    "MAX_SEED",
    "NO_CLASS",
    "Batches",
    "Cache",
    "Columns",
    "Completion",
    "Conversation",
    "Corpus",
    "DatasetStats",
    "Distribution",
    "EpochSampler",
    "Location",
    "Message",
    "MicroBatch",
    "MixtureSampler",
    "PackedRows",
    "Record",
    "RecordReader",
    "Source",
    "Text",
    "Tokenizer",
    "bos_prefix",
    "cache_folder",
    "check_records",
    "columns_of",
    "concatenate",
    "digest_tokenizer",
    "evaluation_batches",
    "examples_source",
    "one_per_row",
    "open_source",
    "pack",
    "permutation",
    "read_records",
    "split_off",
    "summarize_weights",
    "tokenize",
    "tokenize_in_blocks",
]
