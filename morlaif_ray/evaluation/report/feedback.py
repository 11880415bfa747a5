"""Section on the judge: agreement of principles and with people, position bias, calibration, learning curve."""

from __future__ import annotations

import math

from morlaif_ray.errors import PrincipleError
from morlaif_ray.evaluation.report.blocks import NAME, Column, Section, show, show_interval
from morlaif_ray.evaluation.run_tables import Row, RunTables, interval, number
from morlaif_ray.principles import load_principles


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
    else:
        _counts(section)
        _joint(section)
        _principles(section)
        _bias(section)
        _calibration(section)
    _learning_curve(section)
    return section


def _counts(section: Section) -> None:
    found = section.tables.feedback
    counts = [show(number(found, key), "{:,.0f}") for key in _COUNTS]
    section.text(
        "Judge: {}. {} questions gave {} judgements: {} usable, {} ties, {} unusable, {} failed. "
        "Cost: {} tokens, {} USD.".format(
            found.get("judge") or "-", *counts, show(number(found, "cost_usd"), "{:,.2f}")
        )
    )
    for sentence in (_selection(section.tables), _truncation(found)):
        if sentence:
            section.text(sentence)
    statements = _statements(section.tables)
    rows: list[Row] = [
        {"principle": name, "statement": statements.get(name, ""), **row, **_shares(row)}
        for name, row in section.tables.asked.items()
    ]
    section.table("feedback", "Judgements per principle", _FEEDBACK_COLUMNS, rows)


def _selection(tables: RunTables) -> str:
    select = tables.config.feedback.select if tables.config is not None else None
    if select is None or select.kind == "all":
        return ""
    how = (
        "drawn at random"
        if select.kind == "random"
        else f"chosen in {select.rounds} rounds where an ensemble of {select.ensemble_size} preference models disagreed"
    )
    return (
        f"Of the pairs for training at most {select.num_pairs:,} were put to the judge, {how}; the pairs for weights "
        f"and test all were."
    )


def _truncation(found: Row) -> str:
    num = number(found, "num_truncated")
    if math.isnan(num) or num == 0:
        return ""
    return (
        f"{num:,.0f} pairs were longer than the judge's context and lost their oldest turns, then the end of both "
        f"responses."
    )


def _joint(section: Section) -> None:
    """Agreement of joint with separate questions, where several principles were asked in one request."""
    found: Row = section.tables.feedback.get("joint_agreement") or {}
    if not number(found, "num_compared") > 0:
        return
    section.text(
        f"Several principles were asked in one request; on {number(found, 'num_pairs'):,.0f} pairs they were asked "
        f"separately too: the two ways agree on {show_interval(interval(found, 'agreement'))} of "
        f"{number(found, 'num_compared'):,.0f} decided labels."
    )
    rows: list[Row] = [{"principle": name, **row} for name, row in found["by_principle"].items()]
    section.table(
        "joint_agreement",
        "Agreement of joint with separate questions",
        (
            Column("principle", "Principle", NAME),
            Column("agreement", "Agreement", "{:.3f}"),
            Column("num", "Labels", "{:,.0f}"),
        ),
        rows,
        collapsed=True,
    )


def _principles(section: Section) -> None:
    section.picture(
        "agreement",
        "Agreement of principles (Figure 5a of the paper). Blue: they tend to prefer the same response; "
        "orange: opposite ones. Sycophancy is phrased so that high is good, that is, anti-sycophancy.",
        "Heat map, principle by principle, of the share of pairs on which both prefer the same response.",
        "No agreement matrix: 2_feedback/agreement.csv is not there.",
    )
    section.picture(
        "correlation",
        "Correlation of the principles' log-odds over the pairs that both judged: agreement with the judge's "
        "certainty counted in.",
        "Heat map, principle by principle, of the correlation of log-odds.",
        "No correlation matrix: 2_feedback/correlation.csv is not there.",
    )
    section.table(
        "matrix_intervals",
        "Agreement and correlation with 95% intervals",
        _MATRIX_COLUMNS,
        section.tables.matrix_intervals,
        collapsed=True,
    )


def _bias(section: Section) -> None:
    section.picture(
        "position_bias",
        "Taste of the judge for the first-given response, before debiasing, with 95% intervals; right, the share of "
        "labels that depend on the order: asked twice, the judge names the same slot. Asking in both orders "
        "cancels an additive bias exactly.",
        "Dot chart of the mean position bias in nats per question, and of the share of order-dependent labels.",
        "No position bias: each question was asked in one order only, so it cannot be told from the answers.",
    )
    rows = section.tables.position_bias
    decided = [number(row, "num_decided") for row in rows]
    flips = [number(row, "flipped_ab") + number(row, "flipped_ba") for row in rows]
    known = [(n, f) for n, f in zip(decided, flips, strict=True) if n > 0 and not math.isnan(f)]
    if known:
        total = sum(num for num, _ in known)
        share = sum(num * flip for num, flip in known) / (2.0 * total)
        section.text(
            f"Without debiasing {share:.1%} of the {total:,.0f} decided labels would have the other sign "
            f"(one order only, mean over the two orders)."
        )
    section.table("position_bias", "Position bias in figures", _BIAS_COLUMNS, rows, collapsed=True)


def _calibration(section: Section) -> None:
    section.picture(
        "calibration",
        "Does the judge mean its probabilities? Points on the dashed line: people choose the judge's side as often as "
        "it says; below: it is too sure. Areas show numbers of judgements, bars 95% intervals. A single principle need "
        "not predict people; the overall question should.",
        "Small reliability charts per question: human agreement over the judge's confidence.",
        "No calibration: no pair has both a judgement and a human label, or 2_feedback/calibration.csv is not there.",
    )
    overall = section.tables.asked.get("general", {})
    error = number(overall, "calibration_error")
    if not math.isnan(error):
        agreement = interval(
            overall, "human_agreement", "human_agreement_low", "human_agreement_high", "num_human"
        )
        side = "too sure" if number(overall, "overconfidence") > 0 else "not sure enough"
        section.text(
            f"On the overall question the judge agrees with people {show_interval(agreement)} of the time; its "
            f"expected calibration error is {error:.3f} (on the whole it is {side})."
        )
    section.table(
        "calibration",
        "Reliability in figures",
        _CALIBRATION_COLUMNS,
        section.tables.calibration,
        collapsed=True,
    )


def _learning_curve(section: Section) -> None:
    rows = section.tables.learning_curve
    if not rows:
        return
    section.picture(
        "learning_curve",
        "What a judged pair buys: mean accuracy of the preference models on held-out pairs against the test-bed's "
        "noise-free truth, for pairs chosen at random and by the disagreement of a bootstrap ensemble (Christiano et "
        "al. 2017). Bands: 95% intervals over seeds.",
        "Line chart of preference-model accuracy over the number of judged pairs, by way of choosing them.",
        "No learning curve.",
    )
    section.table("learning_curve", "Learning curve in figures", _CURVE_COLUMNS, rows)


def _shares(row: Row) -> Row:
    """Shares of the judgements that were ties, and that could not be used (unusable or failed)."""
    usable, missing = number(row, "usable"), number(row, "unusable")
    failed = number(row, "failed")
    missing += 0.0 if math.isnan(failed) else failed
    asked = usable + missing
    if math.isnan(asked) or asked == 0.0:
        return {}
    return {"tie_share": number(row, "ties") / asked, "missing_share": missing / asked}


def _statements(tables: RunTables) -> dict[str, str]:
    """Principle -> its statement. A folder of further principles may be gone since the run: then only the shipped."""
    extra = tables.config.feedback.principles_dir if tables.config is not None else None
    try:
        known = load_principles("all", extra)
    except PrincipleError:
        known = load_principles("all")
    return {principle.name: principle.statement for principle in known}


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
    Column("calibration_error", "Calibration error", "{:.3f}"),
    Column("usable", "Usable", "{:,.0f}"),
    Column("tie_share", "Ties", "{:.1%}"),
    Column("missing_share", "Unusable", "{:.2%}"),
    Column("mean_position_bias", "Position bias (nats)", "{:+.2f}"),
)
_MATRIX_COLUMNS = (
    Column("principle", "Principle", NAME),
    Column("other", "Other", NAME),
    Column("agreement", "Agreement", "{:.3f}", ("agreement_low", "agreement_high")),
    Column("num_agreement", "Pairs", "{:,.0f}"),
    Column("correlation", "Correlation", "{:+.3f}", ("correlation_low", "correlation_high")),
)
_BIAS_COLUMNS = (
    Column("principle", "Question", NAME),
    Column("mean", "Mean bias (nats)", "{:+.3f}", ("low", "high")),
    Column("num", "Pairs", "{:,.0f}"),
    Column(
        "order_dependent",
        "Order-dependent labels",
        "{:.3f}",
        ("order_dependent_low", "order_dependent_high"),
    ),
    Column("flipped_ab", "Flipped, a first only", "{:.3f}"),
    Column("flipped_ba", "Flipped, b first only", "{:.3f}"),
    Column("num_decided", "Decided", "{:,.0f}"),
)
_CALIBRATION_COLUMNS = (
    Column("principle", "Question", NAME),
    Column("low", "Confidence from", "{:.2f}"),
    Column("high", "to", "{:.2f}"),
    Column("count", "Judgements", "{:,.0f}"),
    Column("confidence", "Mean confidence", "{:.3f}"),
    Column("agreement", "Agreement", "{:.3f}", ("agreement_low", "agreement_high")),
)
_CURVE_COLUMNS = (
    Column("strategy", "Pairs chosen by", NAME),
    Column("num_pairs", "Judged pairs", "{:,.0f}"),
    Column("accuracy", "Accuracy", "{:.4f}", ("low", "high")),
    Column(
        "difference", "Difference from random", "{:+.4f}", ("difference_low", "difference_high")
    ),
    Column("num_seeds", "Seeds", "{:,.0f}"),
)
