"""Data pipeline: sources -> records -> tokens -> sampling order -> batches. No module needs a framework.

sources, formats, hub                 files, hub datasets, pipes and examples -> rows
columns, fields, reading, records     rows -> validated records
record_errors                         collects the errors of all records: file, line, field and remedy
tokenizer, tokenizing, corpus         records -> tokenized examples, fingerprinted; the evaluation split
cache                                 corpora on disk, verified at each start and memory-mapped
sampler, packing, batches             (seed, step) -> rows -> arrays of micro-batches
distribution                          summary of the example weights
provenance                            authority weight and entropy: computed, checked, written to a copy
"""

from distrust.data.batches import IGNORED, Batches, MicroBatch, evaluation_batches
from distrust.data.cache import Cache, cache_folder
from distrust.data.columns import Columns, columns_of
from distrust.data.corpus import Corpus, split_off
from distrust.data.distribution import Distribution, summarize_weights
from distrust.data.fields import NO_CLASS
from distrust.data.packing import PackedRows, concatenate, one_per_row, pack
from distrust.data.reading import DatasetStats, RecordReader, check_records, read_records
from distrust.data.records import Location, Record
from distrust.data.sampler import EpochSampler, MixtureSampler
from distrust.data.sources import Source, examples_source, open_source
from distrust.data.tokenizer import Tokenizer, digest_tokenizer
from distrust.data.tokenizing import bos_prefix, tokenize, tokenize_in_blocks

__all__ = [
    "IGNORED",
    "NO_CLASS",
    "Batches",
    "Cache",
    "Columns",
    "Corpus",
    "DatasetStats",
    "Distribution",
    "EpochSampler",
    "Location",
    "MicroBatch",
    "MixtureSampler",
    "PackedRows",
    "Record",
    "RecordReader",
    "Source",
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
    "read_records",
    "split_off",
    "summarize_weights",
    "tokenize",
    "tokenize_in_blocks",
]
