"""Tokenizers: a word-level one fitted on the spot, or any pretrained one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from morlaif_ray.errors import ArtifactError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
"""A folder with none of these has no tokenizer; transformers would make an empty one up."""

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"


def build_word_tokenizer(texts: Iterable[str], *, vocabulary_size: int, max_length: int) -> Any:
    """A whitespace word-level tokenizer over the most frequent words of `texts` (ties in word order).

    Returns a `PreTrainedTokenizerFast`. Raises ValueError when the texts hold no word.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    counts = Counter(word for text in texts for word in text.split())
    if not counts:
        raise ValueError("the texts hold no word to build a vocabulary from")
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    words = [PAD, EOS, UNKNOWN, *ranked[: max(vocabulary_size - 3, 1)]]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(path: str, revision: str | None = None) -> Any:
    """The tokenizer of a saved or pretrained model; pad falls back to eos. ArtifactError when there is none."""
    from transformers import AutoTokenizer

    folder = Path(path)
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ArtifactError(f"{path}: the tokenizer is missing; save it beside the model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(
            f"{path}: no tokenizer could be loaded ({str(error).splitlines()[0]}); "
            f"give a folder saved by save_pretrained or a reachable model id"
        ) from None
    if tokenizer.eos_token_id is None:
        raise ArtifactError(f"{path}: the tokenizer has no EOS token; add one and save it again")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
