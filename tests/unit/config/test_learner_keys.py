"""Keys about learning: what does not fit together ends while the config is read, in one line."""

from __future__ import annotations

from typing import Any

import pytest

from morlaif_ray.config import parse_config
from morlaif_ray.config.learning import PolicyConfig
from morlaif_ray.errors import ConfigError

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("error")]


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (
            {"batch_size": 64, "samples_per_prompt": 5},
            "batch_size 64 is not a multiple of samples_per_prompt 5",
        ),
        ({"advantage": "grpo"}, "samples_per_prompt is 1; write samples_per_prompt: 2 or more"),
        ({"advantage": "rloo"}, "advantage rloo compares samples of one prompt"),
        (
            {"advantage": "rloo", "samples_per_prompt": 4, "separate_critic": True},
            "advantage rloo has no value function; leave separate_critic out",
        ),
        (
            {"batch_size": 8, "num_minibatches": 4, "learner_ranks": 3},
            "a minibatch of 2 responses is too small for learner_ranks 3; raise batch_size",
        ),
        (
            {"learner_ranks": 2, "learner_gpus_per_rank": 0.5},
            "learner_gpus_per_rank is 0.5; write learner_gpus_per_rank: 1",
        ),
        ({"fsdp": True}, "fsdp slices the model over learner_ranks, which is 1"),
        ({"importance_cap": 0.0}, "importance_cap"),
        ({"staleness": 1}, "staleness 1 needs importance weights; write importance_cap: 2.0"),
        ({"schedule": "step"}, "schedule"),
    ],
)
def test_what_does_not_fit_together_is_refused(policy: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"policy": policy}, "test")
    assert message in str(caught.value)
    assert "policy" in str(caught.value)


@pytest.mark.parametrize(
    "policy",
    [
        {"samples_per_prompt": 4},  # several samples without a group estimator
        {"advantage": "grpo", "samples_per_prompt": 2, "importance_cap": 2.0},
        {"learner_ranks": 2, "fsdp": True, "separate_critic": True},
        {"staleness": 1, "importance_cap": 2.0},
        {"learner_gpus_per_rank": 0.5},  # one rank shares its GPU
        {"learner_ranks": 2, "lora": {"rank": 4}},
        {"learner_ranks": 2, "lora": {"rank": 4}, "fsdp": True},
        {"microbatch_tokens": 4096, "logprob_chunk_tokens": 512, "schedule": "cosine"},
    ],
)
def test_what_fits_together_is_taken(policy: dict[str, Any]) -> None:
    parsed = parse_config({"policy": policy}, "test").policy
    for key, value in policy.items():
        if key != "lora":
            assert getattr(parsed, key) == value


def test_the_defaults_are_one_rank_and_gae_without_weights() -> None:
    policy = PolicyConfig()
    assert (policy.advantage, policy.samples_per_prompt, policy.importance_cap) == ("gae", 1, None)
    assert (policy.learner_ranks, policy.learner_threads, policy.fsdp) == (1, 1, False)
    assert (policy.schedule, policy.microbatch_tokens, policy.logprob_chunk_tokens) == (
        "constant",
        None,
        None,
    )
    assert not policy.gradient_checkpointing
    assert not policy.bf16_autocast
