"""Sections on data and SFT, and on preference models."""

from __future__ import annotations

from morlaif_ray.evaluation.report.blocks import NAME, Column, Section, show
from morlaif_ray.evaluation.run_tables import Row, RunTables, number, readable
from morlaif_ray.evaluation.statistics import measures_length


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
    for name, correlation in _length_meters(tables):
        section.notice(
            f"The scores of {readable(name)} follow the length of the response (correlation {correlation:+.2f}): "
            f"length explains {correlation**2:.0%} of their variance.",
            "warning",
        )
    section.table(
        "pm_calibration",
        "Calibration on held-out pairs: is the model's probability right? Temperature fitted on split weights",
        _CALIBRATION_COLUMNS,
        tables.pm_calibration,
        collapsed=True,
    )
    section.picture(
        "pm_training",
        "Training loss of each model (orange: baselines). ln 2 = 0.693 is guessing.",
        "Small line charts of the training loss of each preference model.",
        "No training losses of preference models: 3_preference_models/training.csv is not there.",
    )
    return section


def _length_meters(tables: RunTables) -> list[tuple[str, float]]:
    """Models whose scores are mostly the length of the response."""
    found = {
        str(row["model"]): number(row, "length_correlation")
        for row in tables.pm_accuracy
        if measures_length(number(row, "length_correlation"))
    }
    return list(found.items())


_CALIBRATION_COLUMNS = (
    Column("model", "Model", NAME),
    Column("temperature", "Temperature", "{:.2f}"),
    Column(
        "error_before", "Calibration error", "{:.3f}", ("error_before_low", "error_before_high")
    ),
    Column("error_after", "After temperature", "{:.3f}"),
    Column("log_loss_before", "Log-loss (nats)", "{:.3f}"),
    Column("log_loss_after", "After temperature", "{:.3f}"),
    Column("num", "Pairs", "{:,.0f}"),
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
