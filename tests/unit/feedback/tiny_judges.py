"""Causal LMs with untrained weights, and a tokenizer: their answers mean nothing, their arithmetic does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": _GROUPED,
    "gemma": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8},
    "gemma2": {**_GROUPED, "head_dim": 8, "sliding_window": 16},
    "mistral": {**_GROUPED, "head_dim": 8, "sliding_window": 16},
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 8},
    "gpt_neox": {"num_attention_heads": 4},
    "olmo2": _GROUPED,
    "phi3": _GROUPED,
    "bloom": {"n_head": 4},
}
"""model_type -> what its configuration needs besides the common sizes."""


def tiny_model(
    family: str,
    *,
    vocabulary: int = 97,
    context: int = 512,
    scale: float = 8.0,
    **changes: Any,
) -> Any:
    """Two layers, 32 wide. The weights are scaled up, so that answers differ clearly between prompts."""
    from transformers import AutoConfig, AutoModelForCausalLM

    special = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    if family == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": context}
    elif family == "bloom":
        sizes = {"hidden_size": 32, "n_layer": 2}
    else:
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "max_position_embeddings": context,
        }
    settings = {**sizes, **FAMILIES[family], **special, **changes}
    config = AutoConfig.for_model(family, vocab_size=vocabulary, **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return model


def tiny_tokenizer(*, chat_template: str | None = None) -> Any:
    """Byte-level BPE that knows "A", " A", "(A" and the like, whatever the text."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    core = ByteLevelBPETokenizer()
    text = "Answer with a letter: A or B. (A) (B) Which response is better? Human: Assistant:"
    core.train_from_iterator(
        [text] * 9, vocab_size=330, special_tokens=["<eos>"], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core._tokenizer, eos_token="<eos>", pad_token="<eos>"
    )
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def make_judge(
    folder: Path,
    family: str = "llama",
    *,
    chat_template: str | None = None,
    context: int = 1024,
    **changes: Any,
) -> Path:
    """A folder that `judge: {kind: local, model: FOLDER}` can name."""
    tokenizer = tiny_tokenizer(chat_template=chat_template)
    model = tiny_model(family, vocabulary=len(tokenizer), context=context, **changes)
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    return folder


def make_letter_judge(folder: Path, **changes: Any) -> Path:
    """A Llama that mostly answers A or B, as a real judge does: where its state usually points lie the letters."""
    from morlaif_ray.backbone import load_causal_lm, load_tokenizer, save_pretrained
    from morlaif_ray.feedback.parsing import letter_of

    make_judge(folder, "llama", scale=3.0, **changes)
    model, tokenizer = load_causal_lm(str(folder)), load_tokenizer(str(folder))
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    with torch.no_grad():
        text = "Which response is better? Answer with a single letter, A or B.\n\nAnswer:"
        if tokenizer.chat_template is not None:
            message = {"role": "user", "content": text}
            text = tokenizer.apply_chat_template(
                [message], tokenize=False, add_generation_prompt=True
            )
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        usual = model.model(ids).last_hidden_state[0, -1]
        letters = [number for number, token in enumerate(tokens) if letter_of(token)]
        # 10 nats above the other 320 tokens: most of the probability, not all of it.
        model.get_output_embeddings().weight[letters] += 10.0 * usual / usual.square().sum()
    save_pretrained(model, tokenizer, folder)
    return folder
