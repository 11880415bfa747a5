"""Stage `4_reward`: weights, and how well every way to combine the principles predicts held-out human labels.

    fit = fit_reward(read_reward_inputs(run_dir), config.reward, seed=config.seed)
    rows = write_reward(folder, fit)          # the files of docs/artifacts.md, `4_reward/`

Split `weights` fits, split `test` reports; everything that is compared is compared on the same test pairs.
Legend: N pairs, K principles, J compared columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from morlaif_ray.artifacts import write_csv, write_json
from morlaif_ray.config.learning import RewardConfig
from morlaif_ray.errors import DataError
from morlaif_ray.reward.ablation import Ablation, ablate
from morlaif_ray.reward.bootstrap import Shares, bootstrap_shares, pair_credit
from morlaif_ray.reward.function import RewardFunction, configured_parameters
from morlaif_ray.reward.normaliser import Normaliser
from morlaif_ray.reward.pairs import PairScores, RewardInputs, odds_matrix
from morlaif_ray.reward.regression import Regression, difference_scale, fit_regression
from morlaif_ray.reward.scalarizers import SCALARIZERS
from morlaif_ray.reward.weighting import ChosenWeights, can_fit, choose_weights
from morlaif_ray.seeding import derive_seed
from morlaif_ray.types import BoolArray, FloatArray, Interval

JSON_DIGITS = 12  # the rest depends on how the linear algebra library splits its sums


@dataclass(frozen=True, slots=True, eq=False)
class Ceiling:
    """The same regression on the judge's own log-odds: what perfect preference models would reach."""

    regression: Regression
    used_K: BoolArray
    """False for a principle on which the judge never had a preference."""
    credit_N: FloatArray
    """Per complete test pair; NaN where the judge left a principle unanswered."""


@dataclass(frozen=True, slots=True, eq=False)
class RewardFit:
    """Content of stage `4_reward`, ready to be written."""

    weights: dict[str, Any]
    """`weights.json`."""
    scalarizers: list[dict[str, Any]]
    differences: list[dict[str, Any]]
    ablation: Ablation
    notes: tuple[str, ...]
    """Lines for the person who runs this."""


@dataclass(frozen=True, slots=True)
class _Column:
    """One line of `scalarizers.csv` before it has an interval."""

    name: str
    kind: str
    credit_N: FloatArray
    num_judgements: int | None


def fit_reward(
    inputs: RewardInputs,
    config: RewardConfig,
    *,
    seed: int,
    bayes_accuracy: Mapping[str, float] | None = None,
) -> RewardFit:
    """Weights with intervals, ceiling, accuracy per scalarizer and baseline, paired differences, ablation.

    Args:
        bayes_accuracy: pair id -> largest accuracy that any rule can expect on its noisy label; None: not known.

    Raises:
        ConfigError: reward.weights names an unknown principle.
        DataError: labels that no regression can be fitted to, or too many missing scores.
    """
    train, test = inputs.weights.complete(), inputs.test.complete()
    for name, pairs in (("weights", inputs.weights), ("test", inputs.test)):
        _check_missing(name, pairs, config.max_missing_share)
    num_labelled = int(inputs.weights.labelled_N.sum())
    chosen = choose_weights(train, num_labelled, inputs.normaliser, config, seed)
    ceiling, no_ceiling = _ceiling_or_why_not(inputs, train, test, config, seed)
    notes = list(chosen.notes)
    rows: list[dict[str, Any]] = []
    differences: list[dict[str, Any]] = []
    ceiling_share: Interval | None = None
    if len(test):
        columns = _compared_columns(inputs, test, chosen, config, bayes_accuracy)
        values_NJ = np.stack([column.credit_N for column in columns], axis=1)
        shares = bootstrap_shares(values_NJ, test.prompt_ids, derive_seed(seed, "accuracy"))
        rows = [_share_row(column, shares.interval(at)) for at, column in enumerate(columns)]
        differences = _difference_rows(columns, shares)
        ceiling_share = _ceiling_share(ceiling, test, seed)
        if ceiling is not None and ceiling_share is not None:
            num = ceiling.regression.num_pairs * int(ceiling.used_K.sum())
            rows.append(_share_row(_Column("ceiling", "ceiling", np.zeros(0), num), ceiling_share))
    else:
        notes.append("no pair of split 'test' has a human label: accuracies are left empty")
    if ceiling_share is None:
        notes.append(no_ceiling)
    ablation = Ablation([], [])
    if chosen.regression is not None and len(test):
        ablation = ablate(
            chosen.regression,
            train,
            test,
            num_orders=config.num_ablation_orders,
            seed=seed,
            ridge=config.ridge,
            nonnegative=config.nonnegative,
        )
    return RewardFit(
        weights=_weights_json(inputs, train, chosen, ceiling, ceiling_share, notes),
        scalarizers=rows,
        differences=differences,
        ablation=ablation,
        notes=tuple(notes),
    )


def write_reward(folder: Path, fit: RewardFit) -> dict[str, int]:
    """Writes the files of `4_reward/` and returns their row counts."""
    write_json(folder / "weights.json", fit.weights)
    tables = {
        "scalarizers": fit.scalarizers,
        "accuracy_difference": fit.differences,
        "ablation": fit.ablation.removed,
        "drop_one": fit.ablation.dropped,
    }
    for name, rows in tables.items():
        write_csv(folder / f"{name}.csv", rows)
    return {
        "pairs": int(fit.weights["num_pairs"]),
        **{name: len(rows) for name, rows in tables.items()},
    }


def scalarizer_credit(
    name: str,
    params: Mapping[str, Any],
    weights_K: FloatArray,
    config: RewardConfig,
    normaliser: Normaliser,
    pairs: PairScores,
) -> FloatArray:
    """Per pair: does the scalarized reward prefer the response that the person chose? (1, 0, tie 0.5)."""
    reward = RewardFunction(
        normaliser,
        weights_K,
        name,
        params=params,
        weighting=config.weighting,
        missing=config.missing,
    )
    reward_a_N = reward(pairs.scores_a_NK).reward_B
    reward_b_N = reward(pairs.scores_b_NK).reward_B
    return pair_credit(reward_a_N, reward_b_N, pairs.labels_N)


def _compared_columns(
    inputs: RewardInputs,
    test: PairScores,
    chosen: ChosenWeights,
    config: RewardConfig,
    bayes_accuracy: Mapping[str, float] | None,
) -> list[_Column]:
    used = [name for name, w in zip(test.principles, chosen.weight_K, strict=True) if w != 0.0]
    num_panel = sum(inputs.num_judgements.get(name, 0) for name in used)
    columns = [
        _Column(
            name,
            "scalarizer",
            scalarizer_credit(
                name,
                configured_parameters(name, config),
                chosen.weight_K,
                config,
                inputs.normaliser,
                test,
            ),
            num_panel,
        )
        for name in SCALARIZERS
    ]
    for at, name in enumerate(test.baselines):
        credit_N = pair_credit(test.baseline_a_NJ[:, at], test.baseline_b_NJ[:, at], test.labels_N)
        columns.append(_Column(name, "baseline", credit_N, inputs.num_judgements.get(name)))
    if bayes_accuracy is not None:
        best_N = np.array([bayes_accuracy[pair_id] for pair_id in test.pair_ids], dtype=np.float64)
        columns.append(_Column("bayes", "bayes", best_N, None))
    return columns


def _share_row(column: _Column, share: Interval) -> dict[str, Any]:
    return {
        "name": column.name,
        "kind": column.kind,
        "accuracy": share.value,
        "low": share.low,
        "high": share.high,
        "num": share.num,
        "num_judgements": "" if column.num_judgements is None else column.num_judgements,
    }


def _difference_rows(columns: list[_Column], shares: Shares) -> list[dict[str, Any]]:
    rows = []
    for at, column in enumerate(columns):
        for other, baseline in enumerate(columns):
            if column.kind != "scalarizer" or baseline.kind != "baseline":
                continue
            gap = shares.difference(at, other)
            rows.append(
                {
                    "scalarizer": column.name,
                    "baseline": baseline.name,
                    "difference": gap.value,
                    "low": gap.low,
                    "high": gap.high,
                }
            )
    return rows


def _ceiling_or_why_not(
    inputs: RewardInputs, train: PairScores, test: PairScores, config: RewardConfig, seed: int
) -> tuple[Ceiling | None, str]:
    """The ceiling, which nothing hangs on, so that it fails without an error; and the note for where there is none."""
    try:
        ceiling = _fit_ceiling(inputs, train, test, config, seed)
    except DataError as error:
        return None, f"no ceiling: {error.message}"
    return ceiling, "too few pairs with both human labels and judgements: no ceiling"


def _fit_ceiling(
    inputs: RewardInputs, train: PairScores, test: PairScores, config: RewardConfig, seed: int
) -> Ceiling | None:
    """Fits on the judge's log-odds of split `weights`; None without enough answered, labelled pairs.

    DataError where `reward.nonnegative` leaves no weight.
    """
    odds_NK = odds_matrix(inputs, train)
    answered_N = np.asarray(~np.isnan(odds_NK).any(axis=1))
    fitted = train.select(answered_N)
    used_K = np.asarray((odds_NK[answered_N] != 0.0).any(axis=0))
    if not can_fit(fitted.labels_N) or not used_K.any():
        return None
    regression = fit_regression(
        odds_NK[answered_N][:, used_K],
        fitted.labels_N,
        fitted.prompt_ids,
        [name for name, used in zip(train.principles, used_K, strict=True) if used],
        num_bootstrap=config.num_bootstrap,
        seed=derive_seed(seed, "ceiling"),
        allow_separable=True,
        ridge=config.ridge,
        nonnegative=config.nonnegative,
    )
    logit_N = regression.logit(odds_matrix(inputs, test)[:, used_K])
    return Ceiling(regression, used_K, pair_credit(logit_N, np.zeros_like(logit_N), test.labels_N))


def _ceiling_share(ceiling: Ceiling | None, test: PairScores, seed: int) -> Interval | None:
    if ceiling is None:
        return None
    answered_N = ~np.isnan(ceiling.credit_N)
    if not answered_N.any():
        return None
    prompt_ids = test.select(answered_N).prompt_ids
    values_N1 = ceiling.credit_N[answered_N][:, None]
    return bootstrap_shares(values_N1, prompt_ids, derive_seed(seed, "accuracy")).interval(0)


def _weights_json(
    inputs: RewardInputs,
    train: PairScores,
    chosen: ChosenWeights,
    ceiling: Ceiling | None,
    ceiling_share: Interval | None,
    notes: list[str],
) -> dict[str, Any]:
    names = inputs.normaliser.principles
    fit = chosen.regression
    scored = inputs.weights.select(inputs.weights.scored_N)
    if fit is not None:
        scale_K = fit.diff_scale_K
    else:
        scale_K = (
            difference_scale(scored.differences_NK, names)
            if len(scored)
            else np.full(len(names), np.nan)
        )
    on_judge: dict[str, float] = {}
    if ceiling is not None:
        used = [name for name, use in zip(names, ceiling.used_K, strict=True) if use]
        found = dict(zip(used, ceiling.regression.coefficient_K, strict=True))
        on_judge = {name: _digits(found.get(name, 0.0)) for name in names}
    return {
        "principles": list(names),
        "weights": _with_interval(names, chosen.weight_K, chosen.low_K, chosen.high_K),
        "coefficients": {}
        if fit is None
        else _with_interval(names, fit.coefficient_K, fit.low_K, fit.high_K),
        "diff_scale": {name: _digits(scale) for name, scale in zip(names, scale_K, strict=True)},
        "normaliser": inputs.normaliser.to_json(),
        "fitted": chosen.source == "fitted",
        "source": chosen.source,
        "num_pairs": len(train),
        "num_incomplete": int((inputs.weights.labelled_N & ~inputs.weights.scored_N).sum()),
        "accuracy_train": _linear_accuracy(chosen, inputs.normaliser, train),
        "ceiling": None
        if ceiling_share is None
        else {
            "accuracy": ceiling_share.value,
            "low": ceiling_share.low,
            "high": ceiling_share.high,
            "num": ceiling_share.num,
        },
        "weights_on_judge": on_judge,
        "notes": notes,
    }


def _linear_accuracy(
    chosen: ChosenWeights, normaliser: Normaliser, train: PairScores
) -> float | None:
    if not len(train):
        return None
    gap_N = (train.differences_NK / normaliser.std_K) @ chosen.weight_K
    return _digits(float(pair_credit(gap_N, np.zeros_like(gap_N), train.labels_N).mean()))


def _with_interval(
    names: tuple[str, ...], value_K: FloatArray, low_K: FloatArray, high_K: FloatArray
) -> dict[str, dict[str, float]]:
    columns = zip(names, value_K, low_K, high_K, strict=True)
    return {
        name: {"weight": _digits(value), "low": _digits(low), "high": _digits(high)}
        for name, value, low, high in columns
    }


def _check_missing(split: str, pairs: PairScores, limit: float) -> None:
    """Missing scores of labelled pairs, as a share of all their scores, against `reward.max_missing_share`."""
    labelled = pairs.select(pairs.labelled_N)
    if not len(labelled):
        return
    columns = (
        labelled.scores_a_NK,
        labelled.scores_b_NK,
        labelled.baseline_a_NJ,
        labelled.baseline_b_NJ,
    )
    share = float(np.isnan(np.concatenate(columns, axis=1)).mean())
    if share > limit:
        raise DataError(
            f"split '{split}': {share:.1%} of the preference models' scores are missing, more than "
            f"reward.max_missing_share ({limit:.1%}); score again, or raise the limit"
        )


def _digits(value: float) -> float:
    return float(f"{value:.{JSON_DIGITS}g}")
