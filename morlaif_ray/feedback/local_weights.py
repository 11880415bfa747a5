"""Which model a local judge is, by content: a folder that is trained anew under its old path is another judge.

Only the standard library: the driver asks this before anything starts.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from morlaif_ray.config.judging import LocalJudge
from morlaif_ray.errors import FeedbackError

SAMPLE_BYTES = 1 << 20
"""Read at the start, middle and end of each weights file; hashing all of 15 GB would take too long."""
CHAT_TOKENS = 48
"""Kept free for what a chat template or the answer cue puts around the messages."""
_TEXT_FILES = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")


def model_version(judge: LocalJudge) -> str:
    """`name@version`: a folder's fingerprint, or a hub id's revision. FeedbackError where a path holds no model."""
    folder = Path(judge.model).expanduser()
    if folder.is_dir():
        return f"{folder.resolve().name}@{_fingerprint(folder)}"
    if judge.model.startswith(("/", ".", "~")):
        raise FeedbackError(
            f"feedback.judge.model: {judge.model} is not a folder; name one saved by save_pretrained, or a hub id"
        )
    return f"{judge.model}@{judge.revision or 'main'}"


def own_limit(judge: LocalJudge) -> tuple[int | None, Path | None]:
    """(tokens of a prompt without what a chat template adds, the tokenizer to count with), as the driver can know them.

    (None, None) for a hub id, or a folder that does not say: the client then cuts by itself, uncounted.
    """
    folder = Path(judge.model).expanduser()
    if not (folder / "tokenizer.json").is_file() or not (folder / "config.json").is_file():
        return None, None
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        return None, None  # loading the model will say what is wrong with it
    config = config.get("text_config", config)
    own = config.get("max_position_embeddings", config.get("n_positions"))
    limit = judge.max_length or own
    return (limit - CHAT_TOKENS, folder) if limit and limit > 2 * CHAT_TOKENS else (None, None)


def _fingerprint(folder: Path) -> str:
    """12 hex digits over configuration, tokenizer and samples of the weights; file names count, paths do not."""
    weights = sorted(folder.glob("*.safetensors"))
    if not weights or not (folder / "config.json").is_file():
        raise FeedbackError(
            f"feedback.judge.model: {folder} holds no config.json with *.safetensors beside it; "
            f"name a folder saved by save_pretrained"
        )
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _TEXT_FILES for path in folder.glob(pattern)}):
        digest.update(path.name.encode() + b"\x00" + hashlib.sha256(path.read_bytes()).digest())
    for path in weights:
        size = path.stat().st_size
        digest.update(f"{path.name}\x00{size}\x00".encode())
        with path.open("rb") as file:
            for start in (0, size // 2, max(0, size - SAMPLE_BYTES)):
                file.seek(start)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:12]
