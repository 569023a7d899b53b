"""Data pipeline: sources -> records -> tokens -> sampling order -> batches. No module needs a framework.

sources, formats, hub                 files, hub datasets, pipes and examples -> rows
columns, fields, reading, records     rows -> validated records
conversations, values                 turns of a conversation, JSON values -> their fields
column_report                         which columns are used, which are ignored
record_errors                         collects the errors of all records: file, line, field and remedy
chat_template, trained_turns          conversations -> text, what of it is trained, how turns end
tokenizer, tokenizing, corpus         records -> tokenized examples, fingerprinted; the evaluation split
cache                                 corpora on disk, verified at each start and memory-mapped
sampler, packing, batches             (seed, step) -> rows -> arrays of micro-batches
preview                               some records -> the text of their tokens, and what of it is trained
distribution                          summary of the example weights
provenance                            authority weight and entropy: computed, checked, written to a copy
"""

from distrust.data.batches import IGNORED, Batches, MicroBatch, evaluation_batches
from distrust.data.cache import Cache
from distrust.data.chat_template import turn_ends
from distrust.data.column_report import ColumnReport, SeenColumns
from distrust.data.columns import Columns, columns_of
from distrust.data.corpus import Corpus, split_off
from distrust.data.distribution import Distribution, summarize_weights
from distrust.data.fields import NO_CLASS
from distrust.data.packing import PackedRows, concatenate, one_per_row, pack
from distrust.data.preview import ShownSequence, read_some, show_record
from distrust.data.reading import DatasetStats, RecordReader, check_records, read_records
from distrust.data.records import Conversation, Location, Record
from distrust.data.sampler import EpochSampler, MixtureSampler
from distrust.data.sources import Source, examples_source, open_source
from distrust.data.tokenizer import Tokenizer, digest_tokenizer
from distrust.data.tokenizing import Limits, bos_prefix, tokenize, tokenize_in_blocks
from distrust.data.values import list_names

__all__ = [
    "IGNORED",
    "NO_CLASS",
    "Batches",
    "Cache",
    "ColumnReport",
    "Columns",
    "Conversation",
    "Corpus",
    "DatasetStats",
    "Distribution",
    "EpochSampler",
    "Limits",
    "Location",
    "MicroBatch",
    "MixtureSampler",
    "PackedRows",
    "Record",
    "RecordReader",
    "SeenColumns",
    "ShownSequence",
    "Source",
    "Tokenizer",
    "bos_prefix",
    "check_records",
    "columns_of",
    "concatenate",
    "digest_tokenizer",
    "evaluation_batches",
    "examples_source",
    "list_names",
    "one_per_row",
    "open_source",
    "pack",
    "read_records",
    "read_some",
    "show_record",
    "split_off",
    "summarize_weights",
    "tokenize",
    "tokenize_in_blocks",
    "turn_ends",
]
