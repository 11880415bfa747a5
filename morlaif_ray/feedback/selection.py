"""Which pairs to ask the judge about next (Christiano et al. 2017), as pure functions of values and contents.

    seed set (by content) -> judge -> bootstrap ensemble -> predictions_MNK -> choose_pairs -> judge -> ...

An ensemble's members see different bootstrap samples of the judged pairs; where they disagree about a pair, its label
teaches most. All M members of all K principles may be heads of one trunk: a pair that is not in a member's sample has
the label NaN there, which the loss leaves out. Nothing depends on an order of rows or on a call: draws and ties are
decided by hashes of the pairs' ids, which are content hashes, so a resumed or repeated run chooses the same pairs.

Legend: M members, N pairs, K principles.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from morlaif_ray.config.selecting import SelectionConfig
from morlaif_ray.seeding import stable_hash, unit_interval
from morlaif_ray.types import BoolArray, FloatArray

BOOTSTRAP_SHARE = 1.0 - float(np.exp(-1.0))
"""Share of distinct rows in a bootstrap sample: 1 - 1/e."""
MEMBER_MARK = "#"


def disagreement(predictions_MNK: FloatArray) -> FloatArray:
    """Variance over the M members of the predicted preference (a probability), averaged over principles [N]."""
    if predictions_MNK.ndim != 3 or len(predictions_MNK) < 2:
        raise ValueError(
            f"an ensemble's predictions are [members >= 2, pairs, principles], got shape {predictions_MNK.shape}"
        )
    variance_N: FloatArray = predictions_MNK.var(axis=0).mean(axis=1)
    return variance_N


def choose_pairs(
    predictions_MNK: FloatArray,
    pair_ids: Sequence[str],
    already: Collection[str],
    num: int,
    seed: int,
) -> list[str]:
    """Ids of the `num` pairs with the highest disagreement that are not in `already`, highest first.

    Args:
        predictions_MNK: probability that response_a is better, by each member for each of the N pairs.
        pair_ids: the N pairs' content hashes. They break ties, together with the seed.
    Fewer than `num` where fewer are left.
    """
    variance_N = disagreement(predictions_MNK)
    known = frozenset(already)
    ranked = sorted(
        (-float(variance), stable_hash(seed, "choose", pair_id), pair_id)
        for variance, pair_id in zip(variance_N, pair_ids, strict=True)
        if pair_id not in known
    )
    return [pair_id for _, _, pair_id in ranked[:num]]


def random_order(pair_ids: Sequence[str], seed: int) -> list[str]:
    """The ids in a seeded order that depends on their contents alone."""
    return sorted(pair_ids, key=lambda pair_id: (stable_hash(seed, "select", pair_id), pair_id))


def bootstrap_members(pair_ids: Sequence[str], num_members: int, seed: int) -> BoolArray:
    """Which pairs are in each member's sample [M, N]: about 63% each, by content, the same in every round.

    Masks stand for resampling with replacement: a pair is in or out. A pair that all members would leave out is given
    to one of them: its judgement has been paid for.
    """
    inside_MN = np.array(
        [
            [
                unit_interval(seed, "member", member, pair_id) < BOOTSTRAP_SHARE
                for pair_id in pair_ids
            ]
            for member in range(num_members)
        ],
        dtype=np.bool_,
    ).reshape(num_members, len(pair_ids))
    for column in np.flatnonzero(~inside_MN.any(axis=0)):
        member = int(unit_interval(seed, "owner", pair_ids[column]) * num_members)
        inside_MN[member, column] = True
    return inside_MN


def member_columns(names: Sequence[str], num_members: int) -> list[str]:
    """Names of the M x K heads on one trunk, member by member."""
    return [f"{name}{MEMBER_MARK}{member}" for member in range(num_members) for name in names]


def member_labels(log_odds_NK: FloatArray, inside_MN: BoolArray) -> FloatArray:
    """Labels of the M x K heads [N, M*K] in the order of `member_columns`; NaN outside a member's sample."""
    parts = [np.where(inside_N[:, None], log_odds_NK, np.nan) for inside_N in inside_MN]
    return np.concatenate(parts, axis=1)


def member_predictions(
    scores_a_NH: FloatArray, scores_b_NH: FloatArray, num_members: int
) -> FloatArray:
    """Probability that response_a is better [M, N, K] from the scores of the M x K heads."""
    difference = np.clip(scores_a_NH - scores_b_NH, -60.0, 60.0)
    num, heads = difference.shape
    probability = 1.0 / (1.0 + np.exp(-difference))
    return probability.reshape(num, num_members, heads // num_members).transpose(1, 0, 2)


def round_sizes(num_pairs: int, rounds: int) -> list[int]:
    """New pairs per round, as even as possible and summing to `num_pairs`; the first round is the seed set."""
    base, extra = divmod(num_pairs, rounds)
    return [base + (number < extra) for number in range(rounds)]


def num_selected(select: SelectionConfig, num_available: int) -> int:
    """How many pairs of the split `preference` the judge is asked about. For forecasts, too."""
    return num_available if select.kind == "all" else min(select.num_pairs, num_available)
