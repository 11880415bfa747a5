"""`morlaif plan`: stages, processes, memory, judgements and cost of a config. Starts nothing, loads no model.

Ends with ResourceError (after everything is printed) where the plan cannot fit: against the cluster that the config
names (`cluster.num_gpus_per_node`, `cluster.gpu_memory_gb`), else against this machine.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from actors.bundles import Available, Bundle, Plan, check_plan
from actors.engines import local_gpus
from actors.memory import ModelShape, shape_of
from actors.placement import intended_cluster, num_principles, plan_bundles, trained_models
from jobs.context import JobContext
from morlaif_ray.config import Config
from morlaif_ray.config.inputs import HubSource
from morlaif_ray.errors import DataError

KNOWN_ROWS = {"Anthropic/hh-rlhf": 160_800}
"""Rows of split `train`, where a data set is not at hand: a plan downloads nothing."""
UNSEEN_PROMPT_CHARS = 600
UNSEEN_RESPONSE_CHARS = 300
"""Mean lengths in hh-rlhf, assumed where no row can be read."""
CHARS_PER_NEW_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Forecast:
    """What the judge will be asked and what it costs. NaN: not known."""

    num_pairs: float
    questions_per_pair: int
    requests_per_pair: int
    """Fewer than the questions in joint mode."""
    tokens_per_request: float
    cost_usd: float
    note: str

    @property
    def num_questions(self) -> float:
        return self.num_pairs * self.questions_per_pair


def run(context: JobContext) -> None:
    config = context.config
    plan = plan_bundles(config)
    forecast = forecast_feedback(config)
    console = Console(highlight=False, soft_wrap=True)
    _print_table(console, "Stages", ("stage", "what"), stage_rows(config, forecast))
    header = ("stage", "process", "number", "CPUs", "GPUs", "memory of each")
    _print_table(console, "Processes", header, [_process_row(bundle) for bundle in plan.bundles])
    for line in summary_lines(config, plan, forecast):
        console.print(line, markup=False)
    check_plan(plan, available_for(config))


def available_for(config: Config) -> Available:
    """The intended cluster, a cluster elsewhere (unknown), or this machine."""
    intended = intended_cluster(config)
    if intended is not None:
        return intended
    if config.cluster.address or os.environ.get("RAY_ADDRESS"):
        return Available(None, math.inf)
    return Available(float(config.cluster.num_cpus or os.cpu_count() or 1), local_gpus())


# ---------------------------------------------------------------- feedback


def forecast_feedback(config: Config) -> Forecast:
    """Questions, tokens and dollars of stage 2, from the data where they are at hand."""
    from morlaif_ray.feedback.forecasting import forecast_pair
    from morlaif_ray.feedback.prices import price_of

    num_pairs, chars, note = _count_pairs(config)
    num_pairs = _selected(config, num_pairs)
    pair = forecast_pair(config.feedback, num_principles(config), chars)
    price = price_of(config.feedback.judge, config.feedback.prices_file)
    cost = math.nan
    if price is not None:
        cost = price.cost_usd(num_pairs * pair.prompt_tokens, num_pairs * pair.completion_tokens)
        cost = 0.0 if price.prompt == price.completion == 0 else cost
    return Forecast(
        num_pairs, pair.questions, pair.requests, pair.prompt_tokens / pair.requests, cost, note
    )


def _selected(config: Config, num_pairs: float) -> float:
    """The pairs left by `feedback.select`, which concerns the split `preference` only (its share as configured)."""
    from morlaif_ray.feedback.selection import num_selected

    if config.feedback.select.kind == "all" or math.isnan(num_pairs):
        return num_pairs
    shares = config.data.splits
    available = round(
        num_pairs * shares.preference / (shares.preference + shares.weights + shares.test)
    )
    return num_pairs - available + num_selected(config.feedback.select, available)


def _count_pairs(config: Config) -> tuple[float, float, str]:
    """(pairs that are judged, mean characters of prompt and both responses, where the numbers come from)."""
    shares = config.data.splits
    judged_share = shares.preference + shares.weights + shares.test
    sampled_chars = 2 * config.pairs.max_new_tokens * CHARS_PER_NEW_TOKEN
    source = config.data.source
    if isinstance(source, HubSource):
        chars = UNSEEN_PROMPT_CHARS + 2 * UNSEEN_RESPONSE_CHARS
        known = KNOWN_ROWS.get(source.id)
        rows = min(source.limit or math.inf, known or math.inf)
        if math.isinf(rows):
            return (
                math.nan,
                chars,
                f"the size of {source.id} is not known here; set data.source.limit",
            )
        return rows * judged_share, chars, "from the data set's size; nothing was downloaded"
    from morlaif_ray.data import load_dataset_records

    try:
        loaded = load_dataset_records(config)
    except DataError as error:
        return math.nan, UNSEEN_PROMPT_CHARS + 2 * UNSEEN_RESPONSE_CHARS, error.message
    wanted = ("preference", "weights", "test")
    if config.pairs.kind == "dataset":
        pairs = [pair for pair in loaded.pairs if pair.split in wanted]
        texts: Iterable[int] = (
            len(pair.prompt) + len(pair.response_a) + len(pair.response_b) for pair in pairs
        )
        return len(pairs), sum(texts) / max(len(pairs), 1), "counted in the data"
    prompts = [prompt for prompt in loaded.prompts if prompt.split in wanted]
    mean_chars = sum(len(prompt.text) for prompt in prompts) / max(len(prompts), 1)
    return len(prompts), mean_chars + sampled_chars, "counted in the data, equal responses included"


# ---------------------------------------------------------------- what is shown


def stage_rows(config: Config, forecast: Forecast) -> list[tuple[str, ...]]:
    """(stage, one line on what it does in this config)."""
    sft, policy = config.sft, config.policy
    shape = shape_of(config.model)
    name = "scratch GPT-2" if config.model.kind == "scratch" else config.model.path
    target = f"{name}, {_parameters(shape)}"
    arms = ", ".join(arm.name for arm in policy.arms)
    sampled = (
        "two responses per prompt" if config.pairs.kind == "sample" else "pairs of the data set"
    )
    trained = trained_models(config)
    rows = [
        (
            "0_sft",
            f"{target}; {sft.num_steps} steps x {sft.batch_size} dialogues"
            if sft.enabled
            else f"{target}; taken as it is",
        ),
        ("1_pairs", f"{_count(forecast.num_pairs)} pairs: {sampled}"),
        (
            "2_feedback",
            f"{_count(forecast.num_questions)} questions to the '{config.feedback.judge.kind}' judge "
            f"({num_principles(config)} principles and the overall question, {config.feedback.orders} orders)",
        ),
        (
            "3_preference_models",
            f"{trained} trainings ({config.preference.topology}), {config.preference.num_epochs} epoch(s) x "
            f"{config.preference.batch_size} pairs, at most {config.preference.concurrent_trials} at a time",
        ),
        (
            "4_reward",
            "weights, scalarizers, ablation" + ("; sweep" if config.sweep.enabled else ""),
        ),
        (
            "5_policy",
            f"{len(policy.arms)} arms ({arms}), {policy.num_steps} steps x {policy.batch_size} responses x "
            f"{policy.max_new_tokens} tokens, {policy.concurrent_arms} at a time",
        ),
        (
            "6_evaluation",
            f"{config.evaluation.num_prompts} prompts, judge: {config.evaluation.judge}",
        ),
    ]
    return rows


def summary_lines(config: Config, plan: Plan, forecast: Forecast) -> list[str]:
    """Totals that a person decides on."""
    lines = [f"needs at least {plan.peak_cpus:g} CPUs and {plan.peak_gpus} GPUs at its peak"]
    per_node = config.cluster.num_gpus_per_node
    if per_node and plan.peak_gpus:
        nodes = math.ceil(plan.peak_gpus / per_node)
        lines[0] += f": {nodes} node{'s' * (nodes > 1)} of {per_node}"
    largest = max(
        (b for b in plan.bundles if b.gpus and not math.isnan(b.memory_gb)),
        default=None,
        key=_memory,
    )
    if largest is not None:
        lines.append(
            f"largest per GPU: {largest.role} of {largest.phase}, about {largest.memory_gb:.1f} GB"
        )
    host = max(_host_gb(turn) for phase in plan.phases for turn in plan.turns(phase))
    lines.append(f"host memory of the processes without a GPU: about {host:.1f} GB at its peak")
    lines.append(
        f"judgements: {_count(forecast.num_questions)} questions in "
        f"{_count(forecast.num_pairs * forecast.requests_per_pair)} requests of about "
        f"{forecast.tokens_per_request:.0f} tokens ({forecast.note})"
    )
    lines.append(_cost_line(config, forecast))
    return lines


def _cost_line(config: Config, forecast: Forecast) -> str:
    judge = config.feedback.judge
    if judge.kind != "openai" and judge.kind != "openai_batch":
        return "cost of the judge: $0 (embedded)"
    if math.isnan(forecast.cost_usd):
        reason = (
            "the number of pairs is not known"
            if math.isnan(forecast.num_pairs)
            else f"the price of '{judge.model}' is not known"
        )
        return f"cost of the judge: unknown ({reason})"
    from morlaif_ray.feedback.prices import prices_as_of

    batch = "Batch API price" if judge.kind == "openai_batch" else "list price"
    line = (
        f"cost of the judge: about ${forecast.cost_usd:,.2f} ({judge.model}, {batch} of "
        f"{prices_as_of(config.feedback.prices_file)}, prompt-cache discount not counted)"
    )
    budget = config.feedback.budget_usd
    if budget is not None and forecast.cost_usd > budget:
        line += f"; MORE than feedback.budget_usd ({budget:g}): the stage would stop there"
    return line


def _memory(bundle: Bundle) -> float:
    return bundle.memory_gb


def _host_gb(bundles: Sequence[Bundle]) -> float:
    return sum(b.count * b.memory_gb for b in bundles if not b.gpus and not math.isnan(b.memory_gb))


def _process_row(bundle: Bundle) -> tuple[str, ...]:
    memory = "unknown" if math.isnan(bundle.memory_gb) else f"{bundle.memory_gb:.1f} GB"
    where = "GPU" if bundle.gpus else "host"
    return (
        bundle.phase,
        bundle.role,
        str(bundle.count),
        f"{bundle.cpus:g}",
        f"{bundle.gpus:.3g}",
        f"{memory} ({where})",
    )


def _parameters(shape: ModelShape | None) -> str:
    if shape is None:
        return "size unknown (set model.num_parameters, num_layers, width, vocabulary_size)"
    count = shape.num_parameters
    return f"{count / 1e9:.2f}B parameters" if count >= 1e9 else f"{count / 1e6:.2f}M parameters"


def _count(number: float) -> str:
    return "an unknown number of" if math.isnan(number) else f"{round(number):,}"


def _print_table(
    console: Console, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """A rich table on a terminal, aligned plain text elsewhere."""
    if console.is_terminal:
        table = Table(title=title, title_justify="left")
        for column in header:
            table.add_column(column)
        for row in rows:
            table.add_row(*row)
        console.print(table)
        return
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    console.print(title, markup=False)
    for row in [header, *rows]:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        console.print(("  " + "  ".join(cells)).rstrip(), markup=False)
