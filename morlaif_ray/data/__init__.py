"""Prompts, demonstrations and response pairs from files, the hub, or the test-bed.

    load_dataset_records(config) -> LoadedData(prompts, dialogues, pairs, bad_rows)

| module | holds |
| --- | --- |
| `files` | raw rows of .jsonl, .jsonl.gz, .json, .parquet, each with its file and line |
| `hub` | raw rows of `datasets.load_dataset` |
| `formats` | one raw row -> one example: hh, pairs, conversational |
| `dialogues` | the hh text format: splitting, joining, dropping old turns |
| `splits` | which split a prompt falls into, which slot a response |
| `loading` | all of it, for a config |
"""

from morlaif_ray.data.loading import LoadedData, load_dataset_records
from morlaif_ray.data.rows import BadRow

__all__ = ["BadRow", "LoadedData", "load_dataset_records"]
