"""With LoRA a worker is sent the adapters alone, and holds the very weights that the learner would have merged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from actors.rollout_worker import RolloutWorker
from morlaif_ray.config.inputs import LoraConfig
from morlaif_ray.config.learning import PolicyConfig
from morlaif_ray.errors import ArtifactError, NumericalError
from morlaif_ray.rl import PPOLearner
from morlaif_ray.rl.adapter_transfer import unpack
from morlaif_ray.rl.generation import TransformersEngine
from morlaif_ray.rl.weight_transfer import WeightBucket, in_buckets
from morlaif_ray.types import RolloutBatch

pytestmark = [
    pytest.mark.unit,
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]

CONFIG = PolicyConfig(
    batch_size=6, learning_rate=5e-2, num_epochs=1, lora=LoraConfig(rank=3, alpha=5.0)
)
REWARDS = np.array([1.0, -1.0, 0.5, 2.0, 0.0, -2.0])


@pytest.fixture
def learner(gpt2: str) -> PPOLearner:
    return PPOLearner(gpt2, CONFIG, seed=0)


def buckets(learner: PPOLearner, max_bytes: int = 1 << 20) -> list[WeightBucket]:
    """As they lie in the object store: copies of the learner's memory, read-only."""
    sent = {name: array.copy() for name, array in learner.policy.sent_weights().items()}
    for array in sent.values():
        array.flags.writeable = False
    return list(in_buckets(sent, learner.step, max_bytes, learner.policy.base_checksum))


def assert_holds_the_policy(engine: Any, learner: PPOLearner) -> None:
    held = {name: p.detach().float().numpy() for name, p in engine.model.named_parameters()}
    expected = learner.weights()
    assert held.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(held[name], value, err_msg=name)


@pytest.mark.parametrize(
    ("kind", "dtype", "targets"),
    [
        ("gpt2", "float32", "all-linear"),  # weights kept as [in, out]
        ("gpt2", "float32", ["wte", "c_attn"]),  # adapters on tied embeddings
        ("llama_untied", "bfloat16", "all-linear"),  # adapters in float32
        ("gemma", "bfloat16", ["q_proj", "v_proj"]),
    ],
)
def test_merged_by_the_worker_they_are_the_learners_weights_bit_for_bit(
    model_path: Callable[[str], str],
    batch: Callable[..., RolloutBatch],
    kind: str,
    dtype: str,
    targets: Any,
) -> None:
    lora = LoraConfig(rank=3, alpha=5.0, target_modules=targets)
    config = CONFIG.model_copy(update={"lora": lora})
    learner = PPOLearner(model_path(kind), config, seed=0, dtype=dtype)
    worker = RolloutWorker(model_path(kind), dtype)
    base = {name: p.detach().clone() for name, p in worker.engine.model.named_parameters()}
    for step in (1, 2):  # the second is merged into the base, too, not into the first
        learner.update(batch(step), REWARDS)
        assert worker.load_buckets(step, *buckets(learner, max_bytes=400)) == step
        assert worker.ping() == step
        assert_holds_the_policy(worker.engine, learner)
    changed = [n for n, p in worker.engine.model.named_parameters() if not torch.equal(p, base[n])]
    assert set(changed) == set(unpack(learner.policy.sent_weights()))
    restarted = RolloutWorker(model_path(kind), dtype)
    restarted.load_buckets(2, *buckets(learner))
    assert_holds_the_policy(restarted.engine, learner)


def test_what_travels_is_what_learns(learner: PPOLearner, batch: Callable[..., Any]) -> None:
    learner.update(batch(0), REWARDS)
    sent = learner.policy.sent_weights()
    adapters = {n: p for n, p in learner.policy.named_parameters() if "lora_" in n}
    tensors = [array for name, array in sent.items() if name.endswith(("/a", "/b"))]
    assert sum(array.size for array in tensors) == sum(p.numel() for p in adapters.values())
    assert all(array.dtype == np.float32 for array in tensors)
    first = sent["transformer.h.0.attn.c_attn.weight/0/a"]
    assert first.shape == (3, 16)
    np.testing.assert_array_equal(
        first, next(p for n, p in adapters.items() if "h.0.attn.c_attn.lora_A" in n).detach()
    )
    assert sent["transformer.h.0.attn.c_attn.weight/0/scaling"] == 5.0 / 3
    assert len(buckets(learner, max_bytes=400)) > 3


def test_without_adapters_all_weights_travel_as_before(gpt2: str) -> None:
    learner = PPOLearner(gpt2, CONFIG.model_copy(update={"lora": None}), seed=0)
    assert learner.policy.base_checksum is None
    np.testing.assert_equal(learner.policy.sent_weights(), learner.weights())
    assert {bucket.base for bucket in buckets(learner)} == {None}


def test_adapters_of_another_base_are_one_clear_line(
    learner: PPOLearner, model_path: Callable[[str], str]
) -> None:
    worker = RolloutWorker(model_path("gpt2"))
    with torch.no_grad():
        worker.engine.model.transformer.h[0].mlp.c_fc.weight[0, 0] += 1e-6  # type: ignore[attr-defined]
    with pytest.raises(ArtifactError) as caught:
        worker.load_buckets(0, *buckets(learner))
    ours = f"{learner.policy.base_checksum:08x}"
    assert f"base weights (checksum {worker.engine._base.checksum:08x}) are not" in str(  # type: ignore[attr-defined]
        caught.value
    )
    assert f"the learner's ({ours}): the model folder differs between nodes" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_worker_that_lacks_a_bucket_takes_none(learner: PPOLearner, gpt2: str) -> None:
    worker = RolloutWorker(gpt2)
    sent = buckets(learner, max_bytes=400)
    with pytest.raises(
        AssertionError, match="weight buckets of version 0, the last one is missing"
    ):
        worker.load_buckets(0, *sent[:-1])
    with pytest.raises(NumericalError, match="got bucket 2 of version 0, expected bucket 1"):
        worker.load_buckets(0, sent[0], *sent[2:])
    assert worker.engine._base is None  # type: ignore[attr-defined]


def test_a_weight_that_the_worker_does_not_have_is_named(learner: PPOLearner, gpt2: str) -> None:
    engine = TransformersEngine.from_path(gpt2)
    adapters = unpack(learner.policy.sent_weights())
    adapters["no.such"] = adapters.popitem()[1]
    assert learner.policy.base_checksum is not None
    with pytest.raises(KeyError, match=r"'no\.such' is not a parameter of the rollout model"):
        engine.load_adapters(adapters, learner.policy.base_checksum, 1)


def test_another_model_is_another_base(
    learner: PPOLearner, gpt2: str, model_path: Callable[[str], str]
) -> None:
    worker = RolloutWorker(gpt2)
    sent = buckets(learner)
    worker.load_buckets(0, *sent)
    worker.load_model(model_path("llama_tied"))
    with pytest.raises(ArtifactError, match="are not the learner's"):
        worker.load_buckets(0, *sent)
    worker.load_model(gpt2)
    worker.load_buckets(0, *sent)
    assert_holds_the_policy(worker.engine, learner)
