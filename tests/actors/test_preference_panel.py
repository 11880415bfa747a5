"""The panel on a real local Ray, for every topology: right columns, killed actors, missing scores."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from actors.preference_model import PreferenceModelActor
from actors.preference_panel import Column, PreferencePanel, panel_columns
from morlaif_ray.artifacts import write_json
from morlaif_ray.config import Config, parse_config
from morlaif_ray.config.inputs import LoraConfig
from morlaif_ray.errors import ActorLostError, ArtifactError, NumericalError
from morlaif_ray.preference import PreferenceModel
from tests.processes import kill, pid_of

pytestmark = [
    pytest.mark.actors,
    pytest.mark.usefixtures("ray_session"),
    pytest.mark.timeout(600),
]
HEADS = ("empathy", "detail", "bias")
TEXTS = [
    f"\n\nHuman: {'red ' * (i % 7)}sun\n\nAssistant: {'moon ' * (i % 5)}good" for i in range(40)
]


def save_model(path: str, heads: tuple[str, ...], folder: Path, **options: Any) -> PreferenceModel:
    model = PreferenceModel.from_backbone(path, heads, max_length=24, seed=5, **options)
    generator = torch.Generator().manual_seed(len(heads[0]))
    with torch.no_grad():
        for parameter in model.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save(folder)
    return model


def config(**preference: Any) -> Config:
    policy = {"max_restarts": 1, "call_timeout_s": 240.0}
    return parse_config({"preference": preference, "policy": policy}, "test")


def trunk_columns(folder: Path) -> list[Column]:
    return [Column(name, str(folder), index) for index, name in enumerate(HEADS)]


def run_folder(path: str, folder: Path, topology: str) -> tuple[dict[str, Any], list[Column]]:
    """Stage 3's models of a topology, with one baseline: (config section, columns)."""
    settings: dict[str, Any] = {"topology": topology}
    options: dict[str, Any] = {"topology": topology}
    if topology in ("adapters", "late_adapters"):
        settings = {"topology": "late_branching" if topology == "late_adapters" else topology}
        settings["lora"] = {"rank": 2}
        options = {"topology": settings["topology"], "lora": LoraConfig(rank=2)}
    together = topology in ("shared_trunk", "late_branching")
    if together:
        save_model(path, HEADS, folder / "models" / "trunk", **options)
    for name in ("baseline_general_principle", *(() if together else HEADS)):
        save_model(path, (name,), folder / "models" / name, **options)
    models = {
        name: {"folder": f"models/{'trunk' if together else name}", "head": i if together else 0}
        for i, name in enumerate(HEADS)
    }
    baselines = {
        "general_principle": {"folder": "models/baseline_general_principle", "head": 0},
        "best_principle": {**models["detail"], "principle": "detail"},
    }
    card = {"topology": topology, "principles": HEADS, "models": models, "baselines": baselines}
    write_json(folder / "panel.json", card)
    return settings, panel_columns(folder, ["general_principle", "best_principle"])


TOPOLOGIES = ("separate", "shared_trunk", "late_branching", "adapters", "late_adapters")


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_every_topology_gives_the_columns_of_its_saved_models(
    backbone: str, tmp_path: Path, topology: str
) -> None:
    settings, columns = run_folder(backbone, tmp_path, topology)
    panel = PreferencePanel(config(**settings), columns, lambda text: None)
    assert len(panel._actors) == {"separate": 4, "shared_trunk": 2, "late_branching": 2}.get(
        topology, 1
    )
    table = panel.score(TEXTS)
    assert table.principles == (*HEADS, "baseline_general_principle", "baseline_best_principle")
    assert table.reasons == ()
    for index, column in enumerate(columns):
        alone = PreferenceModel.load(column.folder).score_heads(TEXTS)[:, column.head]
        # float32 of this 16-wide model is itself up to 6e-5 from float64: a layer norm meets nearly equal states.
        np.testing.assert_allclose(table.scores_BK[:, index], alone, atol=1e-4)
    np.testing.assert_array_equal(table.scores_BK[:, 4], table.scores_BK[:, 1])
    some = panel.score(TEXTS, ["baseline_general_principle", "empathy"])
    assert some.principles == ("baseline_general_principle", "empathy")
    np.testing.assert_allclose(some.scores_BK, table.scores_BK[:, [3, 0]], atol=1e-4)
    with pytest.raises(
        ValueError, match=r"no column 'wit'; it has empathy, detail, bias, baseline"
    ):
        panel.score(TEXTS, ["wit"])
    panel.close()


def test_batches_in_flight_survive_a_killed_actor_without_loss_or_doubling(
    backbone: str, tmp_path: Path
) -> None:
    save_model(backbone, HEADS, tmp_path / "trunk")
    panel = PreferencePanel(config(), trunk_columns(tmp_path / "trunk"), lambda text: None)
    expected = panel.score(TEXTS).scores_BK
    victim = psutil.Process(pid_of(panel._actors[0].handle))
    victim.suspend()  # all batches are under way and none can end before the kill
    pending = [panel.submit(TEXTS[start : start + 10]) for start in range(0, 40, 10)]
    victim.send_signal(signal.SIGKILL)
    parts = [item.result().scores_BK for item in reversed(pending)][::-1]
    np.testing.assert_allclose(np.concatenate(parts), expected, atol=1e-6)
    assert panel._actors[0].num_restarts == 1  # one death, whoever of the four noticed it
    np.testing.assert_array_equal(pending[0].result().scores_BK, parts[0])
    panel.close()


def test_columns_of_an_actor_beyond_its_budget_are_nan_with_the_reason(
    backbone: str, tmp_path: Path
) -> None:
    for name in HEADS[:2]:
        save_model(backbone, (name,), tmp_path / name)
    columns = [Column(name, str(tmp_path / name), 0) for name in HEADS[:2]]
    panel = PreferencePanel(config(), columns, lambda text: None)
    expected = panel.score(TEXTS).scores_BK
    shutil.rmtree(tmp_path / "detail")  # its successor cannot start
    kill(panel._actors[1].handle)
    table = panel.score(TEXTS, missing="mark")
    np.testing.assert_array_equal(table.scores_BK[:, 0], expected[:, 0])
    assert np.isnan(table.scores_BK[:, 1]).all()
    assert len(table.reasons) == 1
    assert table.reasons[0].startswith("preference model detail died 2 times")
    with pytest.raises(ActorLostError, match=r"^preference model detail died"):
        panel.score(TEXTS)
    np.testing.assert_array_equal(panel.score(TEXTS, ["empathy"]).scores_BK, expected[:, :1])
    panel.close()


def test_a_score_that_is_not_finite_is_an_error_or_nan_with_the_reason(
    backbone: str, tmp_path: Path
) -> None:
    model = save_model(backbone, HEADS, tmp_path / "trunk")
    with torch.no_grad():
        model.model.score.weight[1] = float("inf")
    model.save(tmp_path / "trunk")
    panel = PreferencePanel(config(), trunk_columns(tmp_path / "trunk"), lambda text: None)
    reason = "preference model 'detail' gave a non-finite score for text 0"
    with pytest.raises(NumericalError, match=f"^{reason}$"):
        panel.score(TEXTS)
    table = panel.score(TEXTS, missing="mark")
    assert table.reasons == (f"{reason} and 39 more",)
    assert np.isnan(table.scores_BK[:, 1]).all()
    assert np.isfinite(table.scores_BK[:, [0, 2]]).all()
    panel.close()


def test_the_health_check_starts_a_dead_actor_again(backbone: str, tmp_path: Path) -> None:
    save_model(backbone, HEADS, tmp_path / "trunk")
    said: list[str] = []
    panel = PreferencePanel(config(), trunk_columns(tmp_path / "trunk"), said.append)
    assert panel.check_health() == 0
    kill(panel._actors[0].handle)
    assert panel.check_health() == 1
    assert len(said) == 1
    assert "preference model trunk was lost" in said[0]
    panel.close()


def test_a_head_of_another_name_is_refused(backbone: str, tmp_path: Path) -> None:
    save_model(backbone, HEADS, tmp_path / "trunk")
    folder = str(tmp_path / "trunk")
    heads = {folder: {0: "empathy", 2: "detail"}}
    with pytest.raises(
        ArtifactError, match=r"trunk: head 2 should be 'detail', the folder has 'bias'; train stage"
    ):
        PreferenceModelActor([folder], 8, "cpu", None, False, heads)
    with pytest.raises(ArtifactError, match=r"head 3 should be 'wit', .*'only 3 heads'"):
        PreferenceModelActor([folder], 8, "cpu", None, False, {folder: {3: "wit"}})
    with pytest.raises(ActorLostError, match=r"did not start: .*head 0 should be 'wit'"):
        PreferencePanel(config(), [Column("wit", folder, 0)], lambda text: None)


def test_a_principle_without_a_saved_model_is_named(backbone: str, tmp_path: Path) -> None:
    run_folder(backbone, tmp_path, "separate")
    shutil.rmtree(tmp_path / "models" / "bias")
    with pytest.raises(
        ArtifactError, match=r"the preference model of 'bias' is missing \(no .*bias"
    ):
        panel_columns(tmp_path, [])
    card = json.loads((tmp_path / "panel.json").read_text(encoding="utf-8"))
    del card["models"]["detail"]
    write_json(tmp_path / "panel.json", card)
    with pytest.raises(ArtifactError, match=r"the preference model of 'detail' is missing"):
        panel_columns(tmp_path, [])
