"""Small random models with heads as wide as vLLM's CPU attention wants them (32), made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from morlaif_ray.backbone import build_scratch_model, build_word_tokenizer, save_pretrained
from morlaif_ray.config.inputs import ScratchModel
from morlaif_ray.types import GenerationRequest, RolloutBatch
from tests.opinions import give_opinions
from tests.unit.feedback.tiny_judges import CHAT_TEMPLATE, make_letter_judge

WORDS = "Human: Assistant: red green blue sun moon star"
JUDGE_CONTEXT = 1024
POSITIONS = 256
PROMPTS = (
    "\n\nHuman: red\n\nAssistant:",
    "\n\nHuman: sun moon star sun moon\n\nAssistant:",
    "\n\nHuman: blue green\n\nAssistant: star\n\nHuman: red red\n\nAssistant:",
)


def make_judge(folder: Path) -> Path:
    """A Llama with attention heads of a size that vLLM's CPU kernels know (64), inclined to answer A or B."""
    torch.set_num_threads(1)
    return make_letter_judge(
        folder,
        chat_template=CHAT_TEMPLATE,
        context=JUDGE_CONTEXT,
        hidden_size=128,
        num_attention_heads=2,
        num_key_value_heads=1,
    )


def make_model(kind: str, folder: Path, seed: int = 3) -> Any:
    """A saved model with weights wide enough to have opinions; `gpt2` has a tied output layer, `llama` not."""
    tokenizer = build_word_tokenizer([WORDS], vocabulary_size=50, max_length=POSITIONS)
    if kind == "gpt2":
        size = ScratchModel(width=64, num_layers=2, num_heads=2, max_length=POSITIONS)
        model = build_scratch_model(size, tokenizer, seed=seed)
    else:
        import transformers as hf

        torch.manual_seed(seed)
        settings = hf.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=POSITIONS,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=False,
        )
        model = hf.LlamaForCausalLM(settings)
    give_opinions(model).eval()
    save_pretrained(model, tokenizer, folder)
    return model


def weights_of(model: Any) -> dict[str, np.ndarray[Any, Any]]:
    """As the learner gives them: read-only, tied weights once."""
    weights = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    for array in weights.values():
        array.flags.writeable = False
    return weights


def requests(num: int, prompts: tuple[str, ...] = PROMPTS) -> list[GenerationRequest]:
    return [GenerationRequest(prompts[i % len(prompts)], i) for i in range(num)]


def largest_gap(model: Any, batch: RolloutBatch, temperature: float) -> float:
    """Largest difference to the log-probabilities of one plain forward pass of transformers over the same tokens."""
    worst = 0.0
    for row in range(len(batch)):
        start, num = int(batch.prompt_lengths_B[row]), int(batch.response_lengths_B[row])
        ids = torch.tensor(batch.tokens_BL[row : row + 1, : start + num])
        with torch.no_grad():
            logits = model(ids, attention_mask=torch.ones_like(ids)).logits[0, start - 1 : -1]
        logprobs = torch.log_softmax(logits / temperature, -1).gather(1, ids[0, start:, None])
        gap = np.abs(logprobs[:, 0].numpy() - batch.logprobs_BT[row, :num])
        worst = max(worst, float(gap.max()))
    return worst
