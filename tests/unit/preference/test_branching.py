"""Late branching: the shared trunk before training, plain checkpoints after it, and nothing else is accepted."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from morlaif_ray.errors import ArtifactError, ConfigError
from morlaif_ray.preference import PreferenceModel
from morlaif_ray.preference.branching import num_branch_blocks, tail_of
from tests.unit.preference.topology_models import (
    HEADS,
    KINDS,
    TEXTS,
    Backbone,
    branched,
    plain_scores,
)

pytestmark = [
    pytest.mark.unit,
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
]


class TestLateBranching:
    @pytest.mark.parametrize("kind", KINDS)
    def test_before_training_every_branch_is_the_shared_trunk(
        self, backbone: Backbone, kind: str
    ) -> None:
        options: dict[str, Any] = {"max_length": 24, "seed": 5}
        trunk = PreferenceModel.from_backbone(backbone(kind), HEADS, **options)
        late = PreferenceModel.from_backbone(
            backbone(kind), HEADS, topology="late_branching", **options
        )
        np.testing.assert_allclose(late.score_heads(TEXTS), trunk.score_heads(TEXTS), atol=1e-5)

    @pytest.mark.parametrize("blocks", [1, 2])
    @pytest.mark.parametrize("kind", KINDS)
    def test_saved_it_gives_the_same_bits_and_plain_transformers_loads_every_principle(
        self, backbone: Backbone, tmp_path: Path, kind: str, blocks: int
    ) -> None:
        model = branched(backbone(kind), blocks=blocks)
        scores = model.score_heads(TEXTS)
        assert float(np.abs(scores[:, 0] - scores[:, 1]).max()) > 0.05
        model.save(tmp_path)
        loaded = PreferenceModel.load(tmp_path)
        np.testing.assert_array_equal(loaded.score_heads(TEXTS), scores)
        assert (loaded.heads, loaded.max_length) == (model.heads, model.max_length)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        for head, name in enumerate(HEADS):
            plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "heads" / name)
            assert plain.config.id2label == {0: name}
            for row, text in enumerate(TEXTS[:-1]):  # the last one would be truncated
                expected = plain_scores(plain, tokenizer, text)[0]
                np.testing.assert_allclose(scores[row, head], expected, atol=1e-5)

    def test_the_shared_blocks_are_saved_once(self, backbone: Backbone, tmp_path: Path) -> None:
        branched(backbone()).save(tmp_path)
        trunk = load_file(tmp_path / "trunk.safetensors")
        one = load_file(tmp_path / "heads" / "detail" / "branch.safetensors")
        assert not set(trunk) & set(one)
        assert {name.split(".")[2] for name in trunk if ".h." in name} == {"0"}
        assert {name.split(".")[2] for name in one if ".h." in name} == {"1"}

    def test_wanted_heads_alone_are_computed(self, backbone: Backbone) -> None:
        model = branched(backbone())
        whole = model.raw_scores(TEXTS)
        np.testing.assert_array_equal(model.raw_scores(TEXTS, [2, 0]), whole[:, [2, 0]])
        tail: Any = tail_of(model.model)
        tail.branches[1] = None  # would fail if it were evaluated
        np.testing.assert_array_equal(model.raw_scores(TEXTS, [2]), whole[:, [2]])

    @pytest.mark.parametrize(
        ("blocks", "wanted", "found"), [(12, None, 3), (3, None, 1), (3, 2, 2)]
    )
    def test_a_quarter_of_the_blocks_by_default(
        self, blocks: int, wanted: int | None, found: int
    ) -> None:
        assert num_branch_blocks(blocks, wanted) == found

    def test_more_blocks_than_there_are_is_refused(self, backbone: Backbone) -> None:
        with pytest.raises(ConfigError, match=r"branch_blocks 3: the backbone has 2 blocks; write"):
            branched(backbone(), blocks=3)

    def test_mixed_attention_is_refused(self, backbone: Backbone) -> None:
        from morlaif_ray.preference.branching import branch

        model = PreferenceModel.from_backbone(backbone("llama"), ["a"], max_length=24, seed=5).model
        model.config.layer_types = ["full_attention", "sliding_attention"]
        with pytest.raises(ConfigError, match=r"mixed attention \(full_attention, sliding_"):
            branch(model, 2, 1)

    def test_a_missing_branch_is_named(self, backbone: Backbone, tmp_path: Path) -> None:
        branched(backbone()).save(tmp_path)
        shutil.rmtree(tmp_path / "heads" / "detail")
        with pytest.raises(ArtifactError, match=r"heads: the branch of 'detail' is missing; train"):
            PreferenceModel.load(tmp_path)

    @pytest.mark.parametrize("name", ["score.weight", "h.1.mlp.c_fc.weight", "ln_f.bias"])
    def test_a_missing_weight_of_a_branch_is_named(
        self, backbone: Backbone, tmp_path: Path, name: str
    ) -> None:
        branched(backbone()).save(tmp_path)
        path = tmp_path / "heads" / "detail" / "branch.safetensors"
        kept = {key: value for key, value in load_file(path).items() if not key.endswith(name)}
        save_file(kept, path, metadata={"format": "pt"})
        with pytest.raises(ArtifactError, match=rf"detail/branch.*{name}' is missing; train"):
            PreferenceModel.load(tmp_path)

    def test_a_branch_cut_short_is_named(self, backbone: Backbone, tmp_path: Path) -> None:
        branched(backbone()).save(tmp_path)
        path = tmp_path / "heads" / "bias" / "branch.safetensors"
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(ArtifactError, match=r"the branch of 'bias' cannot be read"):
            PreferenceModel.load(tmp_path)
