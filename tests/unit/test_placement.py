"""Placement is a pure function of the config, and an impossible plan says what to reduce."""

import math
from typing import Any

import pytest

from actors.bundles import Available, Bundle, Plan, check_plan, pack_gpus
from actors.memory import (
    VLLM_PROCESS_GB,
    branched,
    shape_of,
    weights_gb,
)
from actors.placement import intended_cluster, plan_bundles, trained_models
from morlaif_ray.config import Config, parse_config
from morlaif_ray.errors import ResourceError


def config_with(**sections: Any) -> Config:
    return parse_config(sections, "test")


def bundle(phase: str = "5_policy", **fields: Any) -> Bundle:
    defaults = {"role": "PPO learner", "count": 1, "cpus": 1.0, "gpus": 0.0, "memory_gb": 1.0}
    return Bundle(phase, **{**defaults, "reduce": "policy.learner_ranks", **fields})


def by_role(plan: Plan, phase: str) -> dict[str, Bundle]:
    return {item.role: item for item in plan.of(phase)}


def test_the_default_has_one_actor_per_principle_and_arm_baseline() -> None:
    plan = plan_bundles(config_with())
    policy = by_role(plan, "5_policy")
    assert policy["preference model"].count == 13  # 12 principles and the single-PM arm
    assert policy["PPO learner"].count == policy["rollout worker"].count == 1


def test_a_shared_trunk_in_one_actor_is_one_process() -> None:
    config = config_with(preference={"topology": "shared_trunk", "panel_placement": "one_actor"})
    plan = plan_bundles(config)
    assert by_role(plan, "5_policy")["preference model"].count == 1
    assert trained_models(config) == 1 + 4  # the trunk and the four default baselines


def test_best_principle_trains_no_model_of_its_own() -> None:
    arms = [{"name": "linear", "scalarizer": "linear"}]
    config = config_with(preference={"baselines": ["best_principle"]}, policy={"arms": arms})
    assert trained_models(config) == 12


def test_concurrent_arms_multiply_learners_and_rollout_workers() -> None:
    plan = plan_bundles(config_with(policy={"concurrent_arms": 2, "num_rollout_workers": 3}))
    policy = by_role(plan, "5_policy")
    assert policy["PPO learner"].count == 2
    assert policy["rollout worker"].count == 6


def test_stages_that_are_switched_off_need_nothing() -> None:
    plan = plan_bundles(config_with(sft={"enabled": False}, sweep={"enabled": False}))
    assert "0_sft" not in plan.phases
    assert "4_reward" not in plan.phases


def test_a_rate_limiter_is_planned_only_where_there_is_a_limit() -> None:
    free = by_role(plan_bundles(config_with()), "2_feedback")
    bound = by_role(plan_bundles(config_with(feedback={"requests_per_minute": 60})), "2_feedback")
    assert "rate limiter" not in free
    assert "rate limiter" in bound


def test_phases_do_not_add_up_because_they_do_not_overlap() -> None:
    plan = Plan((bundle("0_sft", count=3), bundle("5_policy", count=2)))
    assert plan.peak_cpus == 3.0
    check_plan(plan, Available(cpus=3.0, gpus=0.0))


def test_turns_of_a_phase_do_not_add_up_either() -> None:
    plan = Plan((bundle(count=3), bundle(count=2, turn=1), bundle(count=2, turn=1, gpus=1.0)))
    assert (plan.peak_cpus, plan.peak_gpus) == (4.0, 2)
    with pytest.raises(
        ResourceError, match=r"5_policy needs 4 CPUs \(2 x PPO learner at 1 CPU, 2 x"
    ):
        check_plan(plan, Available(cpus=3.0, gpus=2.0))
    check_plan(plan, Available(cpus=4.0, gpus=2.0))


def test_the_actors_that_score_in_stage_3_are_planned() -> None:
    settings = {"panel_placement": "one_actor", "scoring_actors": 8, "cpus_per_trial": 0.5}
    plan = plan_bundles(config_with(preference=settings))
    scoring = by_role(plan, "3_preference_models")["preference model"]
    assert (scoring.count, scoring.turn) == (8, 1)  # 16 saved models, two in each
    assert plan.cpus("3_preference_models") == pytest.approx(8 * 0.3)
    stage = Plan(tuple(plan.of("3_preference_models")))
    with pytest.raises(ResourceError) as caught:
        check_plan(stage, Available(cpus=2.0, gpus=0.0))
    assert caught.value.message == (
        "3_preference_models needs 2.4 CPUs (8 x preference model at 0.3 CPU), there are 2; "
        "reduce preference.scoring_actors, or add CPUs (a local Ray: cluster.num_cpus)"
    )
    one = plan_bundles(config_with(preference={**settings, "scoring_actors": 1}))
    assert by_role(one, "3_preference_models")["preference model"].count == 1


def test_trials_wait_for_one_another_so_one_must_fit() -> None:
    plan = Plan((bundle(count=8, gpus=1.0, waits=True),))
    assert (plan.peak_cpus, plan.peak_gpus) == (1.0, 1)


@pytest.mark.parametrize(
    ("wanted", "gpus"),
    [
        ([], 0),
        ([0.0, 0.0], 0),
        ([0.25] * 13, 4),
        ([0.1] * 13, 2),
        ([0.3] * 4, 2),  # three to a GPU
        ([0.5] * 14, 7),
        ([1.0, 1.0, 0.5, 0.5], 3),
        ([4.0, 0.25], 5),
        ([1 / 3] * 3, 1),
    ],
)
def test_fractions_pack_onto_gpus_and_never_straddle_two(wanted: list[float], gpus: int) -> None:
    assert pack_gpus(wanted) == gpus


def test_too_few_cpus_says_what_is_needed_what_is_there_and_what_to_reduce() -> None:
    plan = Plan(
        (bundle(count=4, cpus=0.5), bundle(role="preference model", cpus=0.3, reduce="x.y"))
    )
    with pytest.raises(ResourceError) as caught:
        check_plan(plan, Available(cpus=2.0, gpus=0.0))
    assert caught.value.message == (
        "5_policy needs 2.3 CPUs (4 x PPO learner at 0.5 CPU, 1 x preference model at 0.3 CPU), there are 2; "
        "reduce policy.learner_ranks or x.y, or add CPUs (a local Ray: cluster.num_cpus)"
    )


def test_too_few_gpus_names_only_what_holds_a_gpu() -> None:
    plan = Plan((bundle(count=2, gpus=1.0), bundle(role="rollout worker", reduce="x.y")))
    with pytest.raises(ResourceError) as caught:
        check_plan(plan, Available(cpus=8.0, gpus=1.0))
    assert caught.value.message == (
        "5_policy needs 2 GPUs (2 x PPO learner at 1 GPU), there are 1; reduce policy.learner_ranks, or add nodes"
    )


def test_one_process_must_fit_on_one_node() -> None:
    plan = Plan((bundle(gpus=16.0),))
    with pytest.raises(ResourceError, match="one PPO learner needs 16 GPUs, a node has 8"):
        check_plan(plan, Available(cpus=None, gpus=math.inf, gpus_per_node=8))


def test_a_process_must_fit_into_its_share_of_a_gpu() -> None:
    plan = Plan((bundle(gpus=0.25, memory_gb=21.0),))
    with pytest.raises(ResourceError) as caught:
        check_plan(plan, Available(cpus=None, gpus=8.0, gpu_memory_gb=80.0))
    assert caught.value.message == (
        "5_policy: one PPO learner needs about 21.0 GB, its share of a GPU (0.25 of 80 GB) is 20.0 GB; "
        "change policy.learner_ranks"
    )


def test_an_unknown_model_is_planned_and_not_judged() -> None:
    config = config_with(
        model={"kind": "pretrained", "path": "someone/model"},
        policy={"learner_gpus_per_rank": 1.0},
        cluster={"num_gpus_per_node": 8, "gpu_memory_gb": 1},
    )
    plan = plan_bundles(config)
    assert math.isnan(by_role(plan, "5_policy")["PPO learner"].memory_gb)
    available = intended_cluster(config)
    assert available is not None
    check_plan(plan, available)


def test_a_scratch_models_parameters_are_those_of_gpt2() -> None:
    shape = shape_of(
        config_with(
            model={
                "kind": "scratch",
                "width": 4,
                "num_layers": 2,
                "num_heads": 2,
                "vocabulary_size": 10,
                "max_length": 8,
            },
            pairs={"max_new_tokens": 2},
            policy={"max_new_tokens": 2},
        ).model
    )
    # embeddings (10+8)*4 = 72; a block: attention 4*16+16, MLP 8*16+20, norms 16 = 244; final norm 8
    assert shape is not None
    assert shape.num_parameters == 72 + 2 * 244 + 8


def test_known_hub_models_need_no_numbers_and_given_numbers_win() -> None:
    known = shape_of(config_with(model={"kind": "pretrained", "path": "gpt2-xl"}).model)
    given = shape_of(
        config_with(model={"kind": "pretrained", "path": "gpt2-xl", "num_parameters": 1e9}).model
    )
    assert known is not None
    assert given is not None
    assert (known.num_layers, known.width, known.num_parameters) == (48, 1600, 1.5576e9)
    assert (given.num_layers, given.num_parameters) == (48, 1e9)


def test_late_branching_is_planned_with_all_its_branches() -> None:
    def planned(topology: str, placement: str = "per_model", **more: Any) -> tuple[float, float]:
        preference = {"topology": topology, "panel_placement": placement, **more}
        model = {"kind": "pretrained", "path": "gpt2"}
        plan = plan_bundles(config_with(model=model, preference=preference))
        stage = by_role(plan, "3_preference_models")
        return stage["preference training"].memory_gb, stage["preference model"].memory_gb

    plain, branches = planned("shared_trunk"), planned("late_branching")
    shape = shape_of(config_with(model={"kind": "pretrained", "path": "gpt2"}).model)
    assert shape is not None
    added = weights_gb(branched(shape, 12, 3)) - weights_gb(shape)
    assert added > 1.5 * weights_gb(shape)  # 33 blocks beside 12
    assert branches[1] - plain[1] == pytest.approx(added)
    assert branches[0] - plain[0] > 4 * added  # weights, gradients, moments; and activations
    together = planned("late_branching", "one_actor")[1] - planned("shared_trunk", "one_actor")[1]
    assert together == pytest.approx(added)
    assert planned("late_branching", lora={}) == planned("adapters", lora={})


def test_a_panel_on_vllm_is_planned_with_a_cache_for_each_model() -> None:
    shared = {"topology": "shared_trunk", "panel_placement": "one_actor"}
    memory = [
        by_role(plan_bundles(config_with(preference={**shared, **more})), "5_policy")[
            "preference model"
        ].memory_gb
        for more in ({}, {"engine": "vllm"}, {"engine": "vllm", "vllm": {"kv_cache_mb": 1024}})
    ]
    # the trunk and the arm's baseline: two engines
    assert memory[1] - memory[0] == pytest.approx(VLLM_PROCESS_GB + 2 * 256 / 1024)
    assert memory[2] - memory[0] == pytest.approx(VLLM_PROCESS_GB + 2 * 1024 / 1024)


def test_the_plan_reserves_what_the_actors_reserve() -> None:
    from actors import placement, ppo_learner, preference_panel, preference_trials, rollout_pool
    from actors.feedback_worker import worker_cpus

    assert ppo_learner.learner_cpus is placement.learner_cpus
    assert rollout_pool.ROLLOUT_CPUS == placement.ROLLOUT_CPUS
    assert preference_panel.PANEL_CPUS == placement.PANEL_CPUS
    config = config_with(preference={"workers_per_trial": 0, "cpus_per_trial": 0.4})
    trial = preference_trials._trial_resources(config, use_gpu=False)
    training = by_role(plan_bundles(config), "3_preference_models")["preference training"]
    assert trial["cpu"] == training.cpus == 0.4
    planned = by_role(plan_bundles(config), "2_feedback")["feedback worker"]
    assert worker_cpus(config.feedback) == planned.cpus


def test_a_local_judge_on_gpus_is_planned_as_its_workers_reserve_it() -> None:
    from actors.feedback_worker import worker_cpus, worker_gpus

    judge = {"kind": "local", "model": "google/gemma-2b", "dtype": "bfloat16"}
    config = config_with(feedback={"judge": {**judge, "gpus_per_worker": 0.5}, "num_workers": 4})
    planned = by_role(plan_bundles(config), "2_feedback")["feedback worker"]
    assert (planned.count, planned.cpus, planned.gpus) == (4, 1.0, 0.5)
    assert (worker_cpus(config.feedback), worker_gpus(config.feedback)) == (1.0, 0.5)
    assert plan_bundles(config).gpus("2_feedback") == 2
    # weights 2.506e9 * 2 bytes = 4.668 GB; 3 caches of 4096 tokens at 2*18*2048*2 bytes = 1.688 GB; logits 0.009 GB;
    # 10% and the 1 GB context of a GPU
    assert planned.memory_gb == pytest.approx((4.668 + 1.688 + 0.009) * 1.1 + 1.0, abs=0.01)


def test_models_in_one_place_are_shared_out_over_the_actors_that_are_asked_for() -> None:
    from actors.preference_panel import Column, _groups

    columns = [Column(name, f"models/{name}", 0) for name in "abcde"]
    columns.append(Column("a2", "models/a", 1))
    together = config_with(preference={"panel_placement": "one_actor"})
    assert _groups(together, columns, 1) == [[f"models/{name}" for name in "abcde"]]
    assert _groups(together, columns, 2) == [
        ["models/a", "models/c", "models/e"],
        ["models/b", "models/d"],
    ]
    assert len(_groups(together, columns, 9)) == 5
    apart = config_with(preference={"panel_placement": "per_model"})
    assert len(_groups(apart, columns, 2)) == 5
