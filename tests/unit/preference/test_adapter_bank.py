"""Banks of adapters: one pass gives the scores of each adapter on its own, and nothing else is accepted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from morlaif_ray.config.inputs import LoraConfig
from morlaif_ray.errors import ArtifactError
from morlaif_ray.preference import AdapterBank, PreferenceModel
from tests.unit.preference.topology_models import (
    KINDS,
    TEXTS,
    Backbone,
    adapter_folders,
    branched,
    opinionated,
    plain_scores,
)

pytestmark = [
    pytest.mark.unit,
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
]


class TestBank:
    @pytest.mark.parametrize("topology", ["adapters", "late_branching"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_one_pass_gives_the_scores_of_each_adapter_on_its_own(
        self, backbone: Backbone, tmp_path: Path, kind: str, topology: str
    ) -> None:
        folders = adapter_folders(backbone(kind), tmp_path, topology)
        bank = AdapterBank.load(folders)
        assert bank._tail is not None
        assert bank._tail.first == (topology == "late_branching")  # the block below: once
        scores = bank.score_folders(TEXTS)
        alone = {folder: PreferenceModel.load(folder).score_heads(TEXTS) for folder in folders}
        assert float(np.abs(alone[folders[0]] - alone[folders[1]]).max()) > 0.05
        for folder in folders:
            np.testing.assert_allclose(scores[folder], alone[folder], atol=1e-5)
            one = bank.score_folders([TEXTS[1]])[folder]
            np.testing.assert_allclose(one, alone[folder][[1]], atol=1e-5)

    @pytest.mark.parametrize("topology", ["adapters", "late_branching"])
    def test_wanted_adapters_alone_in_any_order(
        self, backbone: Backbone, tmp_path: Path, topology: str
    ) -> None:
        folders = adapter_folders(backbone(), tmp_path, topology)
        bank = AdapterBank.load(folders)
        whole = bank.score_folders(TEXTS)
        for wanted in ([folders[2], folders[0]], [folders[1], folders[2], folders[0]]):
            some = bank.score_folders(TEXTS, wanted)
            assert list(some) == wanted
            for folder, scores in some.items():
                np.testing.assert_allclose(scores, whole[folder], atol=1e-5)

    def test_adapters_of_late_branching_touch_the_last_block_alone(
        self, backbone: Backbone, tmp_path: Path
    ) -> None:
        folders = adapter_folders(backbone(), tmp_path, "late_branching")
        names = load_file(Path(folders[0]) / "adapter_model.safetensors")
        assert {name.split(".")[4] for name in names if ".h." in name} == {"1"}

    def test_plain_peft_loads_every_adapter(self, backbone: Backbone, tmp_path: Path) -> None:
        from peft import AutoPeftModelForSequenceClassification

        folders = adapter_folders(backbone("llama"), tmp_path, "late_branching")
        scores = AdapterBank.load(folders).score_folders(TEXTS[:-1])
        for folder in folders:
            plain = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            for row, text in enumerate(TEXTS[:-1]):
                expected = plain_scores(plain, tokenizer, text)
                np.testing.assert_allclose(scores[folder][row], expected, atol=1e-5)

    def test_adapters_of_different_ranks_share_a_pass(
        self, backbone: Backbone, tmp_path: Path
    ) -> None:
        folders = adapter_folders(backbone(), tmp_path)
        model = PreferenceModel.from_backbone(
            backbone(), ["wide"], max_length=24, seed=5, lora=LoraConfig(rank=5)
        )
        opinionated(model, 9).save(tmp_path / "wide")
        scores = AdapterBank.load([*folders, tmp_path / "wide"]).score_folders(TEXTS)
        for folder, found in scores.items():
            alone = PreferenceModel.load(folder).score_heads(TEXTS)
            np.testing.assert_allclose(found, alone, atol=1e-5)

    def refused(self, folders: list[str], match: str) -> None:
        with pytest.raises(ArtifactError, match=match) as caught:
            AdapterBank.load(folders)
        assert "\n" not in str(caught.value)

    def test_adapters_of_two_backbones_are_refused(
        self, backbone: Backbone, tmp_path: Path
    ) -> None:
        first = adapter_folders(backbone(), tmp_path / "a")
        second = adapter_folders(backbone("llama"), tmp_path / "b")
        self.refused([first[0], second[0]], "b/empathy: adapter of backbone .*llama.* one backbone")

    def test_full_weights_in_a_bank_are_refused(self, backbone: Backbone, tmp_path: Path) -> None:
        branched(backbone()).save(tmp_path / "full")
        self.refused([str(tmp_path / "full")], "full: full weights, not an adapter")

    def test_a_variant_of_lora_is_refused(self, backbone: Backbone, tmp_path: Path) -> None:
        folders = adapter_folders(backbone(), tmp_path)
        path = tmp_path / "bias" / "adapter_config.json"
        settings = json.loads(path.read_text(encoding="utf-8")) | {"use_dora": True}
        path.write_text(json.dumps(settings), encoding="utf-8")
        self.refused(folders, r"adapter_config.json: only plain LoRA .*\(found use_dora\)")

    def test_no_adapter_config(self, backbone: Backbone, tmp_path: Path) -> None:
        folders = adapter_folders(backbone(), tmp_path)
        (tmp_path / "bias" / "adapter_config.json").unlink()
        self.refused(folders, "bias/adapter_config.json: missing or damaged; train the model again")

    def test_no_score_head(self, backbone: Backbone, tmp_path: Path) -> None:
        folders = adapter_folders(backbone(), tmp_path)
        path = tmp_path / "bias" / "adapter_model.safetensors"
        kept = {name: value for name, value in load_file(path).items() if "score" not in name}
        save_file(kept, path, metadata={"format": "pt"})
        self.refused(folders, "bias: the score head is missing beside the adapter")


def other_weights(folder: Path) -> None:
    """The same architecture under the same name, trained further."""
    path = folder / "model.safetensors"
    tensors = {name: value + 0.01 for name, value in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("load", [PreferenceModel.load, lambda folder: AdapterBank.load([folder])])
def test_an_adapter_of_another_backbone_is_refused(
    backbone: Backbone, tmp_path: Path, load: Callable[[str], Any]
) -> None:
    shutil.copytree(backbone(), tmp_path / "backbone")
    folders = adapter_folders(str(tmp_path / "backbone"), tmp_path)
    load(folders[0])
    other_weights(tmp_path / "backbone")
    with pytest.raises(ArtifactError, match=r"empathy: this adapter was trained on another back"):
        load(folders[0])
