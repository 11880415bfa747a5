"""Keys about learning: what does not fit together ends while the config is read, in one line."""

from __future__ import annotations

from typing import Any

import pytest

from morlaif_ray.config import parse_config
from morlaif_ray.config.learning import PolicyConfig
from morlaif_ray.errors import ConfigError

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("error")]
SHARED = {"learner_gpus_per_rank": 0.5, "rollout_gpus_per_worker": 0.5}


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
        (
            {"weight_transfer": "gloo", "lora": {"rank": 4}},
            "with lora the adapters alone travel, through the object store; leave weight_transfer out",
        ),
        (
            {"weight_transfer": "gloo", "call_timeout_s": 120},
            "needs weight_transfer_timeout_s (120) below half of call_timeout_s (120), or the learner counts "
            "as lost first; write weight_transfer_timeout_s: 30",
        ),
        (
            {"weight_transfer": "nccl"},
            "weight_transfer nccl moves weights between GPUs, and learner_gpus_per_rank is 0, "
            "rollout_gpus_per_worker 0; give both a GPU, or write weight_transfer: object_store",
        ),
        (
            {"weight_transfer": "ipc", "engine": "transformers", **SHARED},
            "is vLLM's, and engine is transformers; write engine: vllm, or weight_transfer",
        ),
        (
            {"weight_transfer": "nccl", **SHARED},
            "takes no two processes on one GPU, and learner_gpus_per_rank is 0.5, "
            "rollout_gpus_per_worker 0.5; write whole numbers, or weight_transfer: ipc",
        ),
        (
            {"weight_transfer": "ipc", "num_rollout_workers": 2, **SHARED},
            "needs the learner and all rollout workers on one GPU, and they ask for 1.5; write shares",
        ),
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
        {"weight_transfer": "gloo", "engine": "transformers"},
        {"weight_transfer": "nccl", "learner_gpus_per_rank": 1, "rollout_gpus_per_worker": 2},
        {"weight_transfer": "ipc", **SHARED},
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
    assert policy.direct_transfer is None
    assert (policy.schedule, policy.microbatch_tokens, policy.logprob_chunk_tokens) == (
        "constant",
        None,
        None,
    )
    assert not policy.gradient_checkpointing
    assert not policy.bf16_autocast
