"""Stage 6: every policy answers the same held-out prompts; panel, judge and (test-bed) truth look at the answers.

Responses of all policies to a prompt share their random numbers, so policies are compared in pairs. Win rates ask the
judge in both orders; a win needs both (ALGORITHMS.md section 6).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from jobs.context import JobContext
from jobs.train_sft import sft_model_path
from jobs.verdicts import Verdicts, judge_verdicts, oracle_verdicts
from morlaif_ray.artifacts import read_json, read_records, write_csv, write_json, write_table
from morlaif_ray.backbone.dialogue import dialogue_text
from morlaif_ray.evaluation import build_report
from morlaif_ray.evaluation.statistics import mean_interval
from morlaif_ray.evaluation.winrate import win_rate
from morlaif_ray.reward.function import RewardFunction
from morlaif_ray.seeding import derive_seed
from morlaif_ray.types import GenerationRequest, Interval, Prompt

STAGE = "6_evaluation"
SFT = "sft"
REPORT = "report.html"


def run(context: JobContext) -> None:
    inputs = ["0_sft", "1_pairs", "2_feedback", "3_preference_models", "4_reward", "5_policy"]
    if context.config.sweep.enabled:
        inputs.append("4_sweep")
    stage = context.stage(STAGE, sections=["evaluation", "feedback"], inputs=inputs)
    if stage.is_current():
        context.reporter.skipped(STAGE)
    else:
        responses = _answer(context)
        verdicts = _judge(context, responses)
        with stage.writing({"responses": len(responses["policy"])}) as folder:
            write_table(folder / "responses.parquet", responses)
            write_csv(folder / "policies.csv", policy_rows(context, responses))
            write_csv(folder / "win_rates.csv", win_rate_rows(context, verdicts))
            write_json(folder / "samples.json", samples(context, responses))
            context.reporter.line(f"{STAGE}: drawing the report")
            build_report(context.run_dir, folder, folder)
    shutil.copy2(context.path(STAGE, REPORT), context.path(REPORT))


def policies(context: JobContext) -> list[str]:
    """SFT first, then the arms in config order."""
    return [SFT, *(arm.name for arm in context.config.policy.arms)]


def _prompts(context: JobContext) -> list[Prompt]:
    """Held-out prompts: the first ones of split `test` in an order that depends on the seed alone."""
    prompts = [
        prompt
        for prompt in read_records(context.path("0_sft", "prompts.parquet"), Prompt)
        if prompt.split == "test"
    ]
    prompts.sort(
        key=lambda prompt: derive_seed(context.config.seed, "evaluation", prompt.prompt_id)
    )
    return prompts[: context.config.evaluation.num_prompts]


def _answer(context: JobContext) -> dict[str, list[Any]]:
    """Columns of `responses.parquet`: generation, panel scores, rewards of every arm, and the truth where known."""
    from actors.preference_panel import PreferencePanel, panel_columns
    from actors.rollout_pool import RolloutPool
    from morlaif_ray.rl.generation import SamplingSettings

    config = context.config
    context.connect()
    prompts = _prompts(context)
    settings = SamplingSettings(
        config.policy.max_new_tokens, config.evaluation.temperature, tuple(config.policy.stop)
    )
    requests = [
        GenerationRequest(
            prompt.text, derive_seed(config.seed, "evaluation response", prompt.prompt_id)
        )
        for prompt in prompts
    ]
    baselines = list(
        dict.fromkeys(a.baseline for a in config.policy.arms if a.baseline is not None)
    )
    columns = panel_columns(context.path("3_preference_models"), baselines)
    panel = PreferencePanel(config, columns, context.reporter.line)
    pool = RolloutPool(
        config, sft_model_path(context), config.policy.num_rollout_workers, context.reporter.line
    )
    table: dict[str, list[Any]] = {}
    names = policies(context)
    size = config.pairs.batch_size
    with context.reporter.task(
        "evaluation", total=len(names) * len(prompts), unit="responses"
    ) as task:
        for name in names:
            if name != SFT:
                pool.load_model(str(context.path("5_policy", name, "model")))
            chunks = [requests[i : i + size] for i in range(0, len(requests), size)]
            batches = pool.map(chunks, settings, lambda _, batch: task.advance(len(batch)))
            texts = [text for batch in batches for text in batch.responses]
            columns_of = {
                "prompt_id": [prompt.prompt_id for prompt in prompts],
                "prompt": [prompt.text for prompt in prompts],
                "policy": [name] * len(prompts),
                "response": texts,
                "truncated": [bool(cut) for batch in batches for cut in batch.truncated_B],
                "num_words": [len(text.split()) for text in texts],
            }
            columns_of |= _scores(context, panel, prompts, texts)
            columns_of |= _truth(context, prompts, texts)
            for key, values in columns_of.items():
                table.setdefault(key, []).extend(values)
    panel.close()
    pool.close()
    return table


def _scores(
    context: JobContext, panel: Any, prompts: Sequence[Prompt], texts: Sequence[str]
) -> dict[str, list[float]]:
    """Reward of every arm and normalised score of every principle."""
    table = panel.score(
        [dialogue_text(p.text, text) for p, text in zip(prompts, texts, strict=True)]
    )
    place = {name: index for index, name in enumerate(table.principles)}
    weights_json = context.path("4_reward", "weights.json")
    linear = RewardFunction.from_artifacts(weights_json, "linear", context.config.reward)
    principle_scores = table.scores_BK[:, [place[name] for name in linear.principles]]
    columns: dict[str, list[float]] = {}
    for arm in context.config.policy.arms:
        if arm.scalarizer is not None:
            reward = RewardFunction.from_artifacts(
                weights_json, arm.scalarizer, context.config.reward
            )
            values = reward(principle_scores).reward_B
        else:
            panel_json = context.path("3_preference_models", "panel.json")
            reward = RewardFunction.for_baseline(panel_json, str(arm.baseline))
            values = reward(table.scores_BK[:, [place[f"baseline_{arm.baseline}"]]]).reward_B
        columns[f"reward_{arm.name}"] = values.tolist()
    normalised = linear.normaliser.apply(principle_scores)
    for index, name in enumerate(linear.principles):
        columns[f"z_{name}"] = normalised[:, index].tolist()
    return columns


def _truth(
    context: JobContext, prompts: Sequence[Prompt], texts: Sequence[str]
) -> dict[str, list[Any]]:
    """True utility, well-formedness and true principle scores; empty on real data."""
    if not context.config.on_testbed:
        return {}
    from morlaif_ray.testbed import PRINCIPLES, human_utility, principle_scores, read_response

    pairs = [(prompt.text, text) for prompt, text in zip(prompts, texts, strict=True)]
    columns: dict[str, list[Any]] = {
        "oracle_utility": [human_utility(*pair) for pair in pairs],
        "well_formed": [bool(read_response(*pair).well_formed) for pair in pairs],
    }
    scored = [principle_scores(*pair) for pair in pairs]
    for name in PRINCIPLES:
        columns[f"true_{name}"] = [scores[name] for scores in scored]
    return columns


def _judge(context: JobContext, responses: dict[str, list[Any]]) -> list[Verdicts]:
    """Order-wise log-odds of every wanted pair of policies on every prompt."""
    names = policies(context)
    wanted = context.config.evaluation.matrix_arms
    in_matrix = set(names if wanted == "all" else [SFT, *wanted])
    pairs = [
        (second, first)
        for first, second in combinations(names, 2)
        if first == SFT or (first in in_matrix and second in in_matrix)
    ]
    if context.config.evaluation.judge == "oracle":
        return oracle_verdicts(responses, pairs)
    return judge_verdicts(context, responses, pairs)


def win_rate_rows(context: JobContext, verdicts: Sequence[Verdicts]) -> list[dict[str, Any]]:
    settings = context.config.evaluation
    rows = []
    for item in verdicts:
        result = win_rate(
            item.log_odds_ab_N,
            item.log_odds_ba_N,
            tie_threshold=item.tie_threshold,
            num_resamples=settings.num_bootstrap,
            seed=derive_seed(context.config.seed, "win rate", item.policy, item.opponent)
            % (1 << 32),
        )
        rows.append(
            {
                "policy": item.policy,
                "opponent": item.opponent,
                "win_rate": result.interval.value,
                "low": result.interval.low,
                "high": result.interval.high,
                "wins": result.wins,
                "losses": result.losses,
                "ties": result.ties,
                "num_prompts": result.num_prompts,
                "judge": item.judge,
            }
        )
        if item.opponent == SFT:
            shown = rows[-1]
            context.reporter.line(
                f"  {item.policy} against {item.opponent}: win rate {shown['win_rate']:.3f} "
                f"[{shown['low']:.3f}, {shown['high']:.3f}] on {shown['num_prompts']} prompts"
            )
    return rows


def policy_rows(context: JobContext, responses: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Length, truncation, well-formedness, true utility and KL of every policy."""
    owner = np.array(responses["policy"])
    rows = []
    for name in policies(context):
        mine = owner == name

        def figures(column: str, mine: np.ndarray[Any, Any] = mine) -> Interval:
            if column not in responses:
                return Interval(float("nan"), float("nan"), float("nan"), 0)
            values = np.array(responses[column], dtype=np.float64)[mine]
            return mean_interval(values, num_resamples=2000, seed=context.config.seed)

        words, formed, utility = (
            figures(c) for c in ("num_words", "well_formed", "oracle_utility")
        )
        kl = 0.0
        if name != SFT:
            kl = float(read_json(context.path("5_policy", name, "summary.json"))["final_kl"])
        rows.append(
            {
                "policy": name,
                "mean_words": words.value,
                "mean_words_low": words.low,
                "mean_words_high": words.high,
                "truncated_share": float(np.mean(np.array(responses["truncated"])[mine])),
                "well_formed_share": formed.value,
                "well_formed_low": formed.low,
                "well_formed_high": formed.high,
                "oracle_utility": utility.value,
                "oracle_low": utility.low,
                "oracle_high": utility.high,
                "kl": kl,
            }
        )
    return rows


def samples(context: JobContext, responses: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """The first prompts with every policy's response and its scores."""
    principles = read_json(context.path("3_preference_models", "panel.json"))["principles"]
    num_prompts = len(responses["policy"]) // len(policies(context))
    shown = []
    for row in range(min(context.config.evaluation.num_samples_shown, num_prompts)):
        entry: dict[str, Any] = {"prompt": responses["prompt"][row], "responses": {}}
        for number, name in enumerate(policies(context)):
            place = number * num_prompts + row
            truth = None
            if "oracle_utility" in responses:
                truth = {
                    p: responses[f"true_{p}"][place] for p in principles if f"true_{p}" in responses
                }
            entry["responses"][name] = {
                "text": responses["response"][place],
                "scores": {p: responses[f"z_{p}"][place] for p in principles},
                "true_scores": truth,
            }
        shown.append(entry)
    return shown
