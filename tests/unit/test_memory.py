"""What `plan` counts of memory: sums by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from actors.memory import (
    GB,
    Load,
    ModelShape,
    branched,
    generation_gb,
    learner_gb,
    scoring_gb,
    trainable_parameters,
    training_gb,
    weights_gb,
)
from morlaif_ray.config.inputs import LoraConfig
from morlaif_ray.config.learning import PolicyConfig

SHAPE = ModelShape(
    num_parameters=GB, num_layers=2, width=1024, vocabulary_size=1024, bytes_per_weight=2
)


def test_weights_take_their_bytes_divided_by_the_shards() -> None:
    assert weights_gb(SHAPE) == 2.0
    assert weights_gb(SHAPE, shards=4) == 0.5


def test_full_training_holds_weights_gradients_and_two_moments() -> None:
    # 2 GB weights + 3 x 2 GB; activations 32*512*17*2*1024*2 bytes = 1.0625 GB; process 0.52 GB
    assert training_gb(SHAPE, Load(32, 512)) == pytest.approx(2 + 6 + 1.0625 + 0.52)


def test_gradient_checkpointing_keeps_one_layer_in_full() -> None:
    # (2 + 17) instead of 17*2 layer inputs: 32*512*19*1024*2 bytes = 0.59375 GB
    assert training_gb(SHAPE, Load(32, 512), checkpointing=True) == pytest.approx(
        2 + 6 + 0.59375 + 0.52
    )


def test_branches_count_as_blocks_of_the_model_that_holds_them() -> None:
    from morlaif_ray.preference.branching import num_branch_blocks

    # A block has (2**30 - 1024*1024)/2 parameters; two more branches of one block each.
    wide = branched(SHAPE, 3, 1)
    assert wide.num_layers == 4
    assert wide.num_parameters == pytest.approx(2 * GB - 2**20)
    assert branched(SHAPE, 1, 1) == SHAPE
    quarter = branched(replace(SHAPE, num_layers=12), 3, None)
    assert quarter.num_layers == 12 + 2 * num_branch_blocks(12, None)


def test_lora_trains_few_parameters_in_float32() -> None:
    lora = LoraConfig(rank=8)
    assert trainable_parameters(SHAPE, lora) == 18 * 8 * 2 * 1024
    assert trainable_parameters(SHAPE, LoraConfig(rank=8, target_modules=["q"])) == 6 * 8 * 2 * 1024
    states = 18 * 8 * 2 * 1024 * 12 / GB
    assert training_gb(SHAPE, Load(0, 0), lora=lora) == pytest.approx(2 + states + 0.52)


def test_a_reference_copy_and_shards_count() -> None:
    # (2 + 2 + 6) / 4 GB, then 10% and the 1 GB context of a GPU
    memory = training_gb(SHAPE, Load(0, 0), frozen_copies=1, shards=4, on_gpu=True)
    assert memory == pytest.approx(2.5 * 1.1 + 1.0)


def learner(**policy: Any) -> float:
    """Memory of a learner rank of SHAPE beyond process and allocator, with 256 tokens to a row."""
    settings = PolicyConfig(**{"max_new_tokens": 128, "batch_size": 32, **policy})
    return (learner_gb(SHAPE, settings, max_length=256) - 0.61) / 1.05


# 32 rows * 256 tokens * 17*2 layer inputs * 1024 * 2 bytes; 32*128 scored tokens * 1024 words * 8 bytes
ACTIVATIONS, HEAD = 0.53125, 0.03125
EMBEDDINGS = 2 * 1024 * 1024 * 2 / GB


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ({}, 2 + 2 + 6 + ACTIVATIONS + HEAD),  # weights, reference, gradients and moments
        ({"separate_critic": True}, 2 + 2 + 2 + 12 + 2 * ACTIVATIONS + HEAD),
        ({"num_minibatches": 4}, 10 + (ACTIVATIONS + HEAD) / 4),
        ({"microbatch_size": 8}, 10 + (ACTIVATIONS + HEAD) / 4),
        ({"microbatch_tokens": 2048}, 10 + (ACTIVATIONS + HEAD) / 4),
        ({"logprob_chunk_tokens": 1024}, 10 + ACTIVATIONS + HEAD / 4),
        ({"gradient_checkpointing": True}, 10 + ACTIVATIONS * 19 / 34 + HEAD),
        ({"learner_ranks": 2}, 10 + (ACTIVATIONS + HEAD) / 2),  # each rank holds the whole model
        # Slices; all of two layers gathered, their gradients; of the reference 2 * 1024 * 1024 weights of embeddings.
        (
            {"learner_ranks": 2, "fsdp": True},
            5 + 2 + 2 + EMBEDDINGS + (ACTIVATIONS + HEAD) / 2,
        ),
        # With adapters neither a reference nor gradients of the base.
        (
            {"learner_ranks": 2, "fsdp": True, "lora": {"rank": 8}},
            1 + 2 + 18 * 8 * 2 * 1024 * 12 / 2 / GB + (ACTIVATIONS + HEAD) / 2,
        ),
    ],
)
def test_a_learner_rank_holds_what_its_config_says(policy: dict[str, Any], expected: float) -> None:
    assert learner(**policy) == pytest.approx(expected)


def test_a_sharded_rank_of_a_deep_model_gathers_three_layers_at_once() -> None:
    deep = ModelShape(68.977e9, 80, 8192, 32000, 2)
    policy = PolicyConfig(
        learner_ranks=8, fsdp=True, lora=LoraConfig(rank=8), microbatch_size=1, max_new_tokens=1
    )
    whole, layer = 68.977e9 * 2 / GB, 68.977e9 * 2 / 80 / GB
    embeddings = 2 * 32000 * 8192 * 2 / GB
    activations = 512 * 17 * 80 * 8192 * 2 / GB
    expected = whole / 8 + 3 * layer + embeddings + activations
    assert (learner_gb(deep, policy, 512) - 0.61) / 1.05 == pytest.approx(expected, rel=0.01)


def test_generation_holds_weights_and_the_kv_cache() -> None:
    # 2*2*1024*2 bytes per token * 16 * 4096 tokens = 0.5 GB; logits 16*1024*12 bytes
    memory = generation_gb(SHAPE, Load(16, 4096))
    assert memory == pytest.approx(2 + 0.5 + 16 * 1024 * 12 / GB + 0.52)


def test_scoring_holds_every_models_weights_and_one_layer() -> None:
    # 32*512*17*1024*2 bytes = 0.53125 GB
    assert scoring_gb(SHAPE, Load(32, 512), num_models=3) == pytest.approx(6 + 0.53125 + 0.52)


@pytest.mark.parametrize(("width", "code_mb"), [(128, 64 * 2), (512, 64 * 5), (4096, 64 * 5)])
def test_a_float32_learner_on_a_cpu_holds_code_and_copies_of_its_products(
    width: int, code_mb: float
) -> None:
    shape = ModelShape(GB / 4, 2, width, 1024, 4)
    policy = PolicyConfig(max_new_tokens=128, batch_size=32)
    activations = 32 * 256 * 17 * 2 * width * 4 / GB
    held = (
        1 + 1 + 3 + activations + 32 * 128 * 1024 * 8 / GB
    )  # weights, reference, gradients and moments
    copies = (
        (32 * 128 + 2 * width) * 1024 * 4 / GB
    )  # of the output layer's inputs, gradient and weights
    expected = held * 1.05 + copies + code_mb / 1024 + 0.61
    assert learner_gb(shape, policy, max_length=256) == pytest.approx(expected)
