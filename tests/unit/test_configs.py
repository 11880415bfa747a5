"""Every shipped config parses, validates, is planned, and fits the machine that it is for."""

import math
from pathlib import Path

import pytest
import yaml

from actors.bundles import Available, check_plan
from actors.placement import intended_cluster, plan_bundles
from jobs.plan import forecast_feedback, stage_rows, summary_lines
from morlaif_ray.config import Config, load_config
from morlaif_ray.config.learning import ALL_SCALARIZERS

FOLDER = Path(__file__).parents[2] / "configs"
ALL = sorted(FOLDER.glob("*.yaml"))
LAPTOP = ["demo", "smoke", "hh_small"]
PAPER = [
    *("gpt2_medium", "gpt2_large", "gpt2_xl", "gemma_2b", "gemma_7b"),
    *("llama2_7b", "llama2_13b", "llama2_70b"),
]
NODES = {name: 1 for name in PAPER} | {"llama2_70b": 2}


def shipped(name: str) -> Config:
    return load_config(FOLDER / f"{name}.yaml")


def test_the_shipped_configs_are_these() -> None:
    assert {path.stem for path in ALL} == {*LAPTOP, *PAPER}


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_a_shipped_config_parses_and_says_what_it_is(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    assert path.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_a_shipped_config_survives_the_run_folder(path: Path) -> None:
    config = load_config(path)
    assert (
        Config.model_validate(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"))))
        == config
    )


@pytest.mark.parametrize("name", LAPTOP)
def test_a_laptop_config_fits_two_cores_and_no_gpu(name: str) -> None:
    check_plan(plan_bundles(shipped(name)), Available(cpus=2.0, gpus=0.0))


@pytest.mark.parametrize("name", LAPTOP)
def test_a_laptop_config_fits_eight_gigabytes(name: str) -> None:
    plan = plan_bundles(shipped(name))
    peak_gb = max(sum(b.count * b.memory_gb for b in plan.of(phase)) for phase in plan.phases)
    assert peak_gb < 7.0  # the rest is Ray itself


@pytest.mark.parametrize("name", PAPER)
def test_a_paper_config_fits_its_nodes_of_eight_a100(name: str) -> None:
    config = shipped(name)
    available = intended_cluster(config)
    assert available == Available(None, math.inf, gpus_per_node=8, gpu_memory_gb=80.0)
    plan = plan_bundles(config)
    assert not any(math.isnan(bundle.memory_gb) for bundle in plan.bundles)
    check_plan(plan, available)
    assert plan.peak_gpus <= 8 * NODES[name]


@pytest.mark.parametrize("name", PAPER)
def test_a_paper_config_holds_the_papers_settings(name: str) -> None:
    config = shipped(name)
    preference, policy = config.preference, config.policy
    assert (preference.loss, preference.num_epochs, preference.batch_size) == ("margin", 1, 32)
    assert (preference.learning_rate, preference.warmup_steps, preference.max_length) == (
        5e-5,
        250,
        512,
    )
    for lora in (preference.lora, policy.lora):
        assert lora is not None
        assert (lora.rank, lora.alpha, lora.dropout) == (8, 32, 0.1)
    assert (policy.learning_rate, policy.num_epochs, policy.max_new_tokens) == (4e-6, 4, 128)
    assert (policy.kl_coefficient, policy.kl_target, policy.kl_horizon) == (0.05, 6.0, 10_000)
    assert policy.adam_betas == (0.9, 0.95)
    assert {arm.scalarizer for arm in policy.arms} == {*ALL_SCALARIZERS, None}
    assert config.feedback.judge.kind == "openai"


def test_gemma_adapts_all_linear_layers() -> None:
    for name in ("gemma_2b", "gemma_7b"):
        lora = shipped(name).preference.lora
        assert lora is not None
        assert lora.target_modules == "all-linear"


@pytest.mark.parametrize("name", PAPER)
def test_the_judges_cost_is_forecast_within_the_budget(name: str) -> None:
    config = shipped(name)
    forecast = forecast_feedback(config)
    # 40,000 rows x (0.4 + 0.1 + 0.1) pairs x 13 questions x 2 orders
    assert forecast.num_questions == pytest.approx(624_000)
    # (1200 characters / 3 + 150 template tokens) at $0.50, one token at $1.50 per million
    assert forecast.cost_usd == pytest.approx(624_000 * (550 * 0.5 + 1.5) / 1e6)
    assert config.feedback.budget_usd is not None
    assert forecast.cost_usd < config.feedback.budget_usd


def test_the_plan_counts_what_is_at_hand_and_says_what_is_not() -> None:
    demo = forecast_feedback(shipped("smoke"))
    assert demo.cost_usd == 0.0
    assert demo.questions_per_pair == 26
    absent = forecast_feedback(shipped("hh_small"))
    assert math.isnan(absent.num_pairs)
    assert "no such file" in absent.note


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_a_plan_names_every_stage_and_what_it_costs(path: Path) -> None:
    config = load_config(path)
    forecast = forecast_feedback(config)
    assert [row[0] for row in stage_rows(config, forecast)] == [
        *("0_sft", "1_pairs", "2_feedback", "3_preference_models", "4_reward"),
        *("5_policy", "6_evaluation"),
    ]
    lines = summary_lines(config, plan_bundles(config), forecast)
    assert any(line.startswith("cost of the judge:") for line in lines)
    assert any(line.startswith("needs at least") for line in lines)
