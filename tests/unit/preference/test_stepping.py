"""A batch in micro-batches: the same result, also when memory runs out in the middle of a training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from morlaif_ray.config.inputs import LoraConfig
from morlaif_ray.config.preferring import PreferenceConfig
from morlaif_ray.errors import ResourceError
from morlaif_ray.preference import PreferenceModel
from morlaif_ray.preference.losses import bradley_terry
from morlaif_ray.preference.stepping import autocast_dtype, is_out_of_memory
from morlaif_ray.preference.training import TrainingData, train_preference_model

pytestmark = [
    pytest.mark.unit,
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
]

HEADS = ("good", "red")
CONFIG = PreferenceConfig(batch_size=8, num_epochs=2, learning_rate=2e-3, warmup_steps=2)


def make_data(num: int = 40) -> TrainingData:
    rng = np.random.default_rng(1)
    words = ["good", "bad", "red", "blue", "sun", "moon"]
    texts = [
        [f"\n\nHuman: green\n\nAssistant: {' '.join(rng.choice(words, rng.integers(1, 8)))}"]
        for _ in range(2 * num)
    ]
    flat = [text for (text,) in texts]
    log_odds = rng.normal(0.0, 2.0, (num, 2))
    log_odds[::5, 1] = np.nan  # batches in which the heads have different numbers of pairs
    return TrainingData(flat[:num], flat[num:], log_odds, [f"pair{i:02d}" for i in range(num)])


DATA = make_data()


def train(
    path: str, folder: Path, config: PreferenceConfig = CONFIG, **options: Any
) -> tuple[PreferenceModel, list[float]]:
    model = PreferenceModel.from_backbone(path, HEADS, max_length=24, seed=3, lora=config.lora)
    history = train_preference_model(model, DATA, config, seed=9, checkpoint_dir=folder, **options)
    return model, [item.loss for item in history]


def run_out_of_memory(
    monkeypatch: pytest.MonkeyPatch, most: int, error: Exception, from_call: int = 0
) -> list[int]:
    """From call `from_call` on, a forward of more than `most` texts fails. Returns the sizes that went through."""
    forward = PreferenceModel.forward
    sizes: list[int] = []

    def limited(self: PreferenceModel, ids: Sequence[Sequence[int]]) -> torch.Tensor:
        if len(sizes) >= from_call and len(ids) > most:
            raise error
        sizes.append(len(ids))
        return forward(self, ids)

    monkeypatch.setattr(PreferenceModel, "forward", limited)
    return sizes


@pytest.mark.parametrize("size", [1, 3, 8])
def test_micro_batches_change_no_result(
    backbone: Callable[..., str], tmp_path: Path, size: int
) -> None:
    whole, losses = train(backbone(), tmp_path / "a")
    config = CONFIG.model_copy(update={"microbatch_size": size})
    parts, other = train(backbone(), tmp_path / "b", config)
    np.testing.assert_allclose(other, losses, rtol=1e-5)
    np.testing.assert_allclose(
        parts.score_heads(DATA.texts_a), whole.score_heads(DATA.texts_a), atol=1e-4
    )


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_out_of_memory_halves_the_micro_batch_says_so_and_changes_no_result(
    backbone: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    whole, losses = train(backbone(), tmp_path / "a")
    said: list[str] = []
    with monkeypatch.context() as patch:
        sizes = run_out_of_memory(patch, 4, error, from_call=3)
        parts, other = train(backbone(), tmp_path / "b", say=said.append)
    assert sizes[:3] == [16, 16, 16]
    assert set(sizes[3:]) == {4}  # two pairs, four texts
    assert [line[:77] for line in said] == [
        "preference model 'good': out of memory with 8 pairs per forward; going on with 4"[:77],
        "preference model 'good': out of memory with 4 pairs per forward; going on with 2"[:77],
    ]
    assert said[-1].endswith(
        "with 2 and accumulated gradients (set preference.microbatch_size to begin there)"
    )
    np.testing.assert_allclose(other, losses, rtol=1e-5)
    np.testing.assert_allclose(
        parts.score_heads(DATA.texts_a), whole.score_heads(DATA.texts_a), atol=1e-4
    )


def test_a_resumed_training_begins_with_the_micro_batch_that_fitted(
    backbone: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception): ...

    def die(done: int, _: int) -> None:
        if done == 6:
            raise Killed

    said: list[str] = []
    run_out_of_memory(monkeypatch, 8, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(Killed):
        train(backbone(), tmp_path, checkpoint_every=5, on_step=die, say=said.append)
    train(backbone(), tmp_path, say=said.append)
    assert len(said) == 1


def test_a_single_pair_that_does_not_fit_is_an_error_with_the_settings_to_change(
    backbone: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_out_of_memory(monkeypatch, 1, torch.OutOfMemoryError("CUDA out of memory.\nmore lines"))
    with pytest.raises(ResourceError) as caught:
        train(backbone(), tmp_path)
    assert caught.value.message == (
        "preference model 'good': a single pair does not fit into memory (CUDA out of memory.); set "
        "preference.gradient_checkpointing, lower preference.max_length, or train adapters (preference.lora)"
    )


def test_another_runtime_error_is_not_taken_for_want_of_memory(
    backbone: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_out_of_memory(monkeypatch, 0, RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        train(backbone(), tmp_path)
    assert not is_out_of_memory(ValueError("out of memory"))


def test_losses_of_parts_sum_to_the_loss_of_the_whole() -> None:
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(7, 3, generator=rng), torch.randn(7, 3, generator=rng)
    labels = torch.rand(7, 3, generator=rng)
    labels[:5, 1] = float("nan")
    labels[:, 2] = float("nan")
    counts = (~labels.isnan()).sum(dim=0)
    whole = bradley_terry(a, b, labels, centering=0.1)
    parts = [
        bradley_terry(a[i:j], b[i:j], labels[i:j], centering=0.1, counts_H=counts)
        for i, j in ((0, 3), (3, 4), (4, 7))
    ]
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-6)


def test_bfloat16_is_the_default_on_a_gpu_alone_and_reaches_the_matrix_products(
    backbone: Callable[..., str], tmp_path: Path
) -> None:
    assert autocast_dtype("auto", "cuda") is torch.bfloat16
    assert autocast_dtype("auto", "cpu") is None
    assert autocast_dtype("float32", "cuda") is None
    _, exact = train(backbone(), tmp_path / "a")
    low, losses = train(
        backbone(), tmp_path / "b", CONFIG.model_copy(update={"precision": "bfloat16"})
    )
    assert {p.dtype for p in low.model.parameters()} == {torch.float32}
    assert losses != exact
    np.testing.assert_allclose(losses, exact, rtol=0.05)


def test_gradient_checkpointing_reaches_the_blocks_and_trains_adapters(
    backbone: Callable[..., str], tmp_path: Path
) -> None:
    lora = CONFIG.model_copy(update={"lora": LoraConfig(rank=2, dropout=0.0)})
    saving = lora.model_copy(update={"gradient_checkpointing": True})
    plain, losses = train(backbone(), tmp_path / "a", lora)
    model, other = train(backbone(), tmp_path / "b", saving)
    assert model.model.is_gradient_checkpointing
    np.testing.assert_allclose(other, losses, rtol=1e-5)
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(model.model.state_dict()[name], value, atol=1e-4, rtol=1e-3)
    moved = [n for n, p in model.model.named_parameters() if "lora_B" in n and bool(p.abs().sum())]
    assert moved
