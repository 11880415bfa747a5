"""Models and tokenizers under every stage: one way to build, load, and turn a dialogue into tokens."""

from morlaif_ray.backbone.causal import (
    build_scratch_model,
    load_causal_lm,
    load_whole,
    save_pretrained,
)
from morlaif_ray.backbone.decoders import (
    Layout,
    decoder_layers,
    find_layout,
    in_place_of_last_block,
    last_block,
    last_norm,
)
from morlaif_ray.backbone.dialogue import (
    ASSISTANT,
    HUMAN,
    dialogue_text,
    encode_framed_texts,
    encode_prompt,
    encode_scored_text,
    encode_scored_texts,
    with_leading_space,
)
from morlaif_ray.backbone.packing import ATTENTION as PACKED_ATTENTION
from morlaif_ray.backbone.packing import Packing, can_pack, use_packing
from morlaif_ray.backbone.tokenizers import (
    build_word_tokenizer,
    load_tokenizer,
    require_eos,
    require_frame,
)

__all__ = [
    "ASSISTANT",
    "HUMAN",
    "PACKED_ATTENTION",
    "Layout",
    "Packing",
    "build_scratch_model",
    "build_word_tokenizer",
    "can_pack",
    "decoder_layers",
    "dialogue_text",
    "encode_framed_texts",
    "encode_prompt",
    "encode_scored_text",
    "encode_scored_texts",
    "find_layout",
    "in_place_of_last_block",
    "last_block",
    "last_norm",
    "load_causal_lm",
    "load_tokenizer",
    "load_whole",
    "require_eos",
    "require_frame",
    "save_pretrained",
    "use_packing",
    "with_leading_space",
]
