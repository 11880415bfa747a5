"""Sections on data and SFT, feedback, and preference models."""

from __future__ import annotations

from morlaif_ray.errors import PrincipleError
from morlaif_ray.evaluation.report.blocks import NAME, Column, Section, show
from morlaif_ray.evaluation.run_tables import Row, RunTables, number
from morlaif_ray.principles import load_principles


def data_section(tables: RunTables, figures: dict[str, bytes]) -> Section:
    section = Section(
        "data",
        "Data and supervised fine-tuning",
        "Prompts are split by hash, so that no prompt stands in two splits; the target model is "
        "fine-tuned on demonstrations and then samples two responses per prompt. Everything that "
        "follows is compared with this model (SFT).",
        tables,
        figures,
    )
    if tables.sft_metrics:
        metrics = tables.sft_metrics
        section.text(
            f"The target model has {show(number(metrics, 'num_parameters'), '{:,.0f}')} parameters and "
            f"saw {show(number(metrics, 'num_dialogues'), '{:,.0f}')} dialogues; loss "
            f"{show(number(metrics, 'final_loss'))} nats per token in training, "
            f"{show(number(metrics, 'heldout_loss'))} on held-out dialogues."
        )
    section.picture(
        "sft_training",
        "Training loss of the target model.",
        "Line chart of the fine-tuning loss over steps.",
        "No fine-tuning losses: SFT is disabled in the config, or the stage has not run.",
    )
    if not tables.pair_metrics:
        section.notice("Stage 1_pairs has not run: there are no response pairs.")
        return section
    pairs = tables.pair_metrics
    by_split = pairs.get("num_by_split") or {}
    rows: list[Row] = [{"what": f"pairs, split {name}", "value": n} for name, n in by_split.items()]
    rows += [
        {"what": "pairs in all", "value": number(pairs, "num_pairs")},
        {"what": "dropped: both responses equal", "value": number(pairs, "num_identical")},
    ]
    section.table(
        "pairs",
        "Response pairs",
        [Column("what", "Pairs"), Column("value", "Number", "{:,.0f}")],
        rows,
    )
    formed = number(pairs, "well_formed_share")
    words = (
        f"Responses have {show(number(pairs, 'mean_response_words'), '{:.1f}')} words on average"
    )
    section.text(words + (f"; {formed:.1%} of them are well formed." if formed == formed else "."))
    return section


def feedback_section(tables: RunTables, figures: dict[str, bytes]) -> Section:
    section = Section(
        "feedback",
        "Feedback per principle",
        "For every pair and principle the judge says which response is better, asked in both orders; half "
        "the difference of the two answers is the label, half their sum the position bias. Agreement with "
        "people is the share of non-tied labelled pairs on which the judge's sign is the human choice.",
        tables,
        figures,
    )
    if not tables.feedback:
        section.notice("Stage 2_feedback has not run: there are no judgements.")
        return section
    found = tables.feedback
    counts = [show(number(found, key), "{:,.0f}") for key in _COUNTS]
    section.text(
        "Judge: {}. {} questions gave {} judgements: {} usable, {} ties, {} unusable, {} failed. "
        "Cost: {} tokens, {} USD.".format(
            found.get("judge") or "-", *counts, show(number(found, "cost_usd"), "{:,.2f}")
        )
    )
    statements = _statements(tables)
    rows: list[Row] = [
        {"principle": name, "statement": statements.get(name, ""), **row}
        for name, row in tables.asked.items()
    ]
    section.table("feedback", "Judgements per principle", _FEEDBACK_COLUMNS, rows)
    section.picture(
        "agreement",
        "Agreement of principles (Figure 5a of the paper). Blue: they tend to prefer the same response; "
        "orange: opposite ones. Sycophancy is phrased so that high is good, that is, anti-sycophancy.",
        "Heat map, principle by principle, of the share of pairs on which both prefer the same response.",
        "No agreement matrix: 2_feedback/agreement.csv is not there.",
    )
    section.picture(
        "position_bias",
        "Taste of the judge for the first-given response, before debiasing. Asking in both orders "
        "cancels an additive bias exactly.",
        "Dot chart of the mean position bias in nats per question.",
        "No position bias: each question was asked in one order only, so it cannot be told from the answers.",
    )
    return section


def preference_section(tables: RunTables, figures: dict[str, bytes]) -> Section:
    section = Section(
        "preference-models",
        "Preference models",
        "One preference model per principle learns to predict the judge from the text alone; the single-objective "
        "baselines learn by the same recipe on the same pairs. Accuracy against the judge's label says how well "
        "a model learned its principle, accuracy against the human label how much that principle alone says "
        "about people's choice (below 0.5: people tend to choose against it).",
        tables,
        figures,
    )
    section.picture(
        "pm_accuracy",
        "Accuracy on held-out prompts with 95% bootstrap intervals; ties of the judge left out.",
        "Dot chart of preference-model accuracy per principle and baseline with intervals.",
        "Stage 3_preference_models has not run: there are no accuracies.",
    )
    section.table(
        "pm_accuracy",
        "Accuracies in figures",
        _ACCURACY_COLUMNS,
        tables.pm_accuracy,
        collapsed=True,
    )
    section.picture(
        "pm_training",
        "Training loss of each model (orange: baselines). ln 2 = 0.693 is guessing.",
        "Small line charts of the training loss of each preference model.",
        "No training losses of preference models: 3_preference_models/training.csv is not there.",
    )
    return section


_COUNTS = (
    "num_questions",
    "num_judgements",
    "num_usable",
    "num_ties",
    "num_unusable",
    "num_failed",
    "tokens",
)
_FEEDBACK_COLUMNS = (
    Column("principle", "Principle", NAME),
    Column("statement", "A good response, in words"),
    Column(
        "human_agreement",
        "Agreement with people",
        "{:.3f}",
        ("human_agreement_low", "human_agreement_high"),
    ),
    Column("num_human", "Pairs", "{:,.0f}"),
    Column("usable", "Usable", "{:,.0f}"),
    Column("ties", "Ties", "{:,.0f}"),
    Column("unusable", "Unusable", "{:,.0f}"),
    Column("mean_position_bias", "Position bias (nats)", "{:+.2f}"),
)
_ACCURACY_COLUMNS = (
    Column("model", "Model", NAME),
    Column("kind", "Kind"),
    Column("label", "Label"),
    Column("accuracy", "Accuracy", "{:.3f}", ("low", "high")),
    Column("num", "Pairs", "{:,.0f}"),
    Column("num_judgements", "Judgements in training", "{:,.0f}"),
    Column("length_correlation", "Correlation with length", "{:+.2f}"),
)


def _statements(tables: RunTables) -> dict[str, str]:
    """Principle -> its statement. A folder of further principles may be gone since the run: then only the shipped."""
    extra = tables.config.feedback.principles_dir if tables.config is not None else None
    try:
        known = load_principles("all", extra)
    except PrincipleError:
        known = load_principles("all")
    return {principle.name: principle.statement for principle in known}
