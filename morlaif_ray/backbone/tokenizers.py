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


def load_tokenizer(path: str, revision: str | None = None, *, encoders: bool = False) -> Any:
    """The tokenizer of a saved or pretrained model; pad falls back to eos. ArtifactError when there is none.

    With `encoders` one that begins texts with [CLS] and ends them with [SEP], as encoders have, needs no EOS.
    """
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
    if tokenizer.eos_token_id is None and not (encoders and _frames_texts(tokenizer)):
        require_eos(path, tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.sep_token
    return tokenizer


def require_eos(path: str, tokenizer: Any) -> None:
    if tokenizer.eos_token_id is None:
        raise ArtifactError(f"{path}: the tokenizer has no EOS token; add one and save it again")


def require_frame(path: str, tokenizer: Any) -> None:
    """ArtifactError where a tokenizer does not write texts as encoders read them."""
    if not _frames_texts(tokenizer):
        raise ArtifactError(
            f"{path}: the tokenizer of an encoder must begin a text with its [CLS] and end it with its [SEP] token; "
            f"take the tokenizer that belongs to the backbone"
        )


def _frames_texts(tokenizer: Any) -> bool:
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    if first is None or last is None:
        return False
    ids = tokenizer("a")["input_ids"]
    return bool(ids[0] == first and ids[-1] == last)
