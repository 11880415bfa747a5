"""Every mistake in a config is one line: what, where, what to write instead."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from morlaif_ray.config import Config, load_config, parse_config
from morlaif_ray.errors import ConfigError

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("error")]


def problem(raw: dict[str, Any]) -> str:
    """The message without its file, checked to be one line."""
    with pytest.raises(ConfigError) as caught:
        parse_config(raw, "file.yaml")
    message = str(caught.value)
    assert message.startswith("file.yaml: ")
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message.removeprefix("file.yaml: ")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"polcy": {}}, "polcy: unknown key; did you mean 'policy'?"),
        ({"policy": {"num_step": 1}}, "policy.num_step: unknown key; did you mean 'num_steps'?"),
        (
            {"policy": {"arms": [{"name": "a", "scalarizr": "linear"}]}},
            "policy.arms.0.scalarizr: unknown key; did you mean 'scalarizer'?",
        ),
        (
            {"model": {"kind": "scratch", "widht": 8}},
            "model.widht: unknown key; did you mean 'width'?",
        ),
        (
            {"data": {"source": {"kind": "files", "paths": ["x"], "limits": 3}}},
            "data.source.limits: unknown key; did you mean 'limit'?",
        ),
        (
            {"policy": {"lora": {"rnk": 8}}},
            "policy.lora.rnk: unknown key; did you mean 'rank'?",
        ),
        ({"gae_lambda": 1}, "gae_lambda: unknown key; did you mean 'policy.gae_lambda'?"),
        ({"data": {"files": 1}}, "data.files: unknown key"),
        ({"feedback": {"openai": {}}}, "feedback.openai: unknown key"),
        ({"xyzzy": 1}, "xyzzy: unknown key"),
    ],
)
def test_an_unknown_key_names_its_place_and_the_nearest_key(
    raw: dict[str, Any], message: str
) -> None:
    assert problem(raw) == message


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            {"policy": {"num_steps": "many"}},
            "policy.num_steps: input should be a valid integer, unable to parse string as an "
            "integer (given: 'many')",
        ),
        (
            {"policy": {"num_steps": 0}},
            "policy.num_steps: input should be greater than 0 (given: 0)",
        ),
        (
            {"policy": {"gamma": 1.5}},
            "policy.gamma: input should be less than or equal to 1 (given: 1.5)",
        ),
        (
            {"policy": {"adam_betas": [0.9, 1.0]}},
            "policy.adam_betas.1: input should be less than 1 (given: 1.0)",
        ),
        ({"seed": -1}, "seed: input should be greater than or equal to 0 (given: -1)"),
        (
            {"policy": {"learning_rate": float("inf")}},
            "policy.learning_rate: input should be a finite number (given: inf)",
        ),
        (
            {"feedback": {"judge": {"kind": "rules", "position_bias": float("nan")}}},
            "feedback.judge.position_bias: input should be a finite number (given: nan)",
        ),
        (
            {"preference": {"workers_per_trial": -1}},
            "preference.workers_per_trial: input should be greater than or equal to 0 (given: -1)",
        ),
        (
            {"evaluation": {"judge": "human"}},
            "evaluation.judge: input should be 'training' or 'oracle' (given: 'human')",
        ),
        ({"model": {"kind": "pretrained"}}, "model.path: is required; add it"),
        ({"policy": None}, "policy: must be a section with keys of its own (given: None)"),
        ({"policy": 5}, "policy: must be a section with keys of its own (given: 5)"),
        (
            {"policy": {"arms": ["linear"]}},
            "policy.arms.0: must be a section with keys of its own (given: 'linear')",
        ),
        (
            {"data": {"source": "hub"}},
            "data.source: must be a section with keys of its own (given: 'hub')",
        ),
    ],
)
def test_a_wrong_value_is_shown_with_what_is_right(raw: dict[str, Any], message: str) -> None:
    assert problem(raw) == message


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            {"data": {"source": {"num_prompts": 5}}},
            "data.source: write kind: testbed, files or hub",
        ),
        (
            {"data": {"source": {"kind": "file"}}},
            "data.source: kind 'file' is unknown; write kind: testbed, files or hub",
        ),
        ({"model": {"width": 8}}, "model: write kind: scratch or pretrained"),
        (
            {"feedback": {"judge": {"model": "x"}}},
            "feedback.judge: write kind: rules, openai, openai_batch or local",
        ),
    ],
)
def test_a_missing_kind_lists_the_kinds(raw: dict[str, Any], message: str) -> None:
    assert problem(raw) == message


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            {"feedback": {"principles": "al"}},
            "feedback.principles: input should be a valid list or input should be 'all' (given: 'al')",
        ),
        (
            {"reward": {"weights": "fited"}},
            "reward.weights: input should be 'fitted' or input should be a valid dictionary "
            "(given: 'fited')",
        ),
        (
            {"reward": {"weights": {"detail": "heavy"}}},
            "reward.weights.detail: input should be a valid number, unable to parse string as a "
            "number (given: 'heavy')",
        ),
    ],
)
def test_a_value_of_several_forms_is_one_problem(raw: dict[str, Any], message: str) -> None:
    assert problem(raw) == message


@pytest.mark.parametrize(
    ("raw", "num"),
    [({"a": 1, "b": 2}, "1 more problem)"), ({"a": 1, "b": 2, "c": 3}, "2 more problems)")],
)
def test_further_problems_are_counted(raw: dict[str, Any], num: str) -> None:
    assert problem(raw) == f"a: unknown key (and {num}"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            {"policy": {"arms": [{"name": "a"}]}},
            "policy.arms.0: arm 'a' needs exactly one of 'scalarizer' and 'baseline'",
        ),
        ({"policy": {"arms": []}}, "policy.arms: at least one arm is needed"),
        (
            {"policy": {"arms": [{"name": "a", "scalarizer": "linear"}] * 2}},
            "policy.arms: arm names must differ; got a, a",
        ),
        (
            {"policy": {"batch_size": 10, "num_minibatches": 4}},
            "policy: batch_size 10 is not a multiple of num_minibatches 4",
        ),
        (
            {"sft": {"batch_size": 10, "num_workers": 4}},
            "sft: batch_size 10 is not a multiple of num_workers 4",
        ),
        (
            {"model": {"kind": "scratch", "width": 30, "num_heads": 4}},
            "model: width 30 is not a multiple of num_heads 4",
        ),
        (
            {"data": {"splits": {"sft": 0.5}}},
            "data.splits: the five shares sum to 1.15; make them sum to 1",
        ),
        (
            {"policy": {"arms": [{"name": "a", "baseline": "best_principle"}]}},
            "policy.arms: arm 'a' uses baseline 'best_principle', which is not in "
            "preference.baselines; add it there",
        ),
        (
            {"evaluation": {"matrix_arms": ["linear", "nash"]}},
            "evaluation.matrix_arms names 'nash', which is no arm; arms are linear, single_pm",
        ),
        (
            {"pairs": {"kind": "dataset"}},
            "pairs.kind is 'dataset' but the test-bed has prompts only; write pairs.kind: sample",
        ),
        (
            {
                "data": {"source": {"kind": "files", "paths": ["x.jsonl"]}},
                "feedback": {"judge": {"kind": "rules", "measures": "testbed"}},
            },
            "feedback.judge.measures is 'testbed' but data.source.kind is 'files'; "
            "write measures: lexical, or use another judge",
        ),
        (
            {
                "data": {"source": {"kind": "files", "paths": ["x.jsonl"]}},
                "evaluation": {"judge": "oracle"},
            },
            "evaluation.judge is 'oracle', which only knows test-bed dialogues; write judge: training",
        ),
        (
            {"model": {"kind": "scratch", "max_length": 64}},
            "policy.max_new_tokens 128 leaves no room for a prompt within model.max_length 64; "
            "lower it or raise model.max_length",
        ),
        (
            {"pairs": {"max_new_tokens": 256}},
            "pairs.max_new_tokens 256 leaves no room for a prompt within model.max_length 256; "
            "lower it or raise model.max_length",
        ),
    ],
)
def test_sections_that_contradict_each_other_are_told_apart(
    raw: dict[str, Any], message: str
) -> None:
    assert problem(raw) == message


class TestFile:
    """Reading the file itself."""

    def refused(self, path: Path, match: str) -> None:
        with pytest.raises(ConfigError, match=match) as caught:
            load_config(path)
        assert str(caught.value).startswith(str(path))
        assert "\n" not in str(caught.value)

    def test_an_absent_file(self, tmp_path: Path) -> None:
        self.refused(tmp_path / "none.yaml", "no such config file; see configs/ for examples")

    def test_a_folder(self, tmp_path: Path) -> None:
        self.refused(tmp_path, "is a folder; give a YAML file such as configs/demo.yaml")

    @pytest.mark.parametrize(
        ("content", "match"),
        [
            (b"name: caf\xe9\n", "byte 9 is not UTF-8; save the file as UTF-8"),
            (b"seed: 1\npolicy: [1, 2\n", "line 3: expected"),
            (b"seed: 1\nname: a: b\n", "line 2: mapping values are not allowed here"),
            (b"seed: 1\npolicy:\n  num_steps: 3\nseed: 2\n", "line 4: key 'seed' is written twice"),
            (b"policy:\n  gamma: 1\n  gamma: 0.5\n", "line 3: key 'gamma' is written twice"),
            (b"- a\n- b\n", "must hold sections such as 'policy:', not a list"),
            (b"just words\n", "must hold sections such as 'policy:', not a str"),
            (b"seed: !!python/object:os.system x\n", "line 1: could not determine a constructor"),
            (b"a\x00b: 1\n", "not valid YAML"),
        ],
    )
    def test_a_file_that_is_no_config(self, tmp_path: Path, content: bytes, match: str) -> None:
        path = tmp_path / "x.yaml"
        path.write_bytes(content)
        self.refused(path, match)

    def test_an_empty_file_is_all_defaults(self, tmp_path: Path) -> None:
        (tmp_path / "x.yaml").write_text("# nothing\n", encoding="utf-8")
        assert load_config(tmp_path / "x.yaml") == load_config(None) == Config()

    def test_anchors_and_floats_as_people_write_them(self, tmp_path: Path) -> None:
        text = "policy: {learning_rate: 1e-4}\nsweep: &s {weight_spread: 2}\n"
        (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
        config = load_config(tmp_path / "x.yaml")
        assert (config.policy.learning_rate, config.sweep.weight_spread) == (1e-4, 2.0)


class TestSet:
    """`--set a.b=c`."""

    def test_values_are_read_as_yaml(self) -> None:
        config = load_config(
            None,
            [
                "policy.num_steps=20",
                "policy.learning_rate=1e-5",
                "preference.topology=shared_trunk",
                "policy.lora.rank=4",
                "sft.enabled=false",
                "feedback.budget_usd=null",
                "feedback.principles=[detail, bias]",
                "reward.weights={detail: 1.0, bias: -0.5}",
                "description=a = b",
                "policy.num_steps=30",
            ],
        )
        assert config.policy.num_steps == 30  # the last one wins
        assert config.policy.learning_rate == 1e-5
        assert config.preference.topology == "shared_trunk"
        assert config.policy.lora is not None
        assert config.policy.lora.rank == 4
        assert config.sft.enabled is False
        assert config.feedback.principles == ["detail", "bias"]
        assert config.reward.weights == {"detail": 1.0, "bias": -0.5}
        assert config.description == "a = b"

    @pytest.mark.parametrize("name", ["nan", "inf", "infinity", "1_000_x"])
    def test_a_word_that_python_reads_as_a_number_stays_a_word(self, name: str) -> None:
        assert load_config(None, [f"name={name}"]).name == name

    def test_a_value_of_the_file_is_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "x.yaml").write_text(
            "policy: {num_steps: 5, batch_size: 8}\n", encoding="utf-8"
        )
        policy = load_config(tmp_path / "x.yaml", ["policy.num_steps=6"]).policy
        assert (policy.num_steps, policy.batch_size) == (6, 8)

    @pytest.mark.parametrize(
        ("override", "match"),
        [
            ("policy.num_steps", "write it as section.key=value, e.g. policy.num_steps=20"),
            ("=3", "write it as section.key=value"),
            ("seed.deep=3", "config: seed: input should be a valid integer"),
            ("policy.arms=[a", "the value is not valid YAML; quote it"),
            ("policy.num_step=3", "policy.num_step: unknown key; did you mean 'num_steps'?"),
            ("data.source.num_prompts=3", "data.source: write kind: testbed, files or hub"),
            ("a\nb", "write it as section.key=value"),
        ],
    )
    def test_a_wrong_override_is_one_line(self, override: str, match: str) -> None:
        with pytest.raises(ConfigError) as caught:
            load_config(None, [override])
        assert match in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_value_is_no_section(self, tmp_path: Path) -> None:
        (tmp_path / "x.yaml").write_text("seed: 1\n", encoding="utf-8")
        with pytest.raises(ConfigError, match="'seed' is not a section"):
            load_config(tmp_path / "x.yaml", ["seed.deep=3"])


def test_a_config_never_changes_after_parsing() -> None:
    config = Config()
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1  # type: ignore[misc]


def test_operational_sections_make_no_stage_stale() -> None:
    base = Config().result_sections()
    moved = parse_config({"cluster": {"num_cpus": 3}, "tracking": {"tracker": "none"}}, "x")
    assert moved.result_sections() == base
    assert parse_config({"seed": 1}, "x").result_sections() != base


def test_reading_a_config_loads_no_heavy_module() -> None:
    code = (
        "import sys; from morlaif_ray.config import load_config; load_config(None); "
        "print([m for m in ('torch', 'transformers', 'ray', 'vllm', 'peft') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
