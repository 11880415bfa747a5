"""The report's figures by file name. Each takes the run's tables and gives a `Figure`, or None without data.

Importing this package imports matplotlib: do it where figures are drawn, not at the head of other modules.
"""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure

from morlaif_ray.evaluation.figures import feedback, learning, policy, reward, wins
from morlaif_ray.evaluation.figures.style import report_style, to_png
from morlaif_ray.evaluation.run_tables import RunTables

FIGURES: dict[str, Callable[[RunTables], Figure | None]] = {
    "sft_training": learning.sft_training,
    "agreement": feedback.agreement,
    "correlation": feedback.correlation,
    "position_bias": feedback.position_bias,
    "calibration": feedback.calibration,
    "learning_curve": feedback.learning_curve,
    "pm_accuracy": learning.pm_accuracy,
    "pm_training": learning.pm_training,
    "weights": reward.weights,
    "scalarizer_accuracy": reward.scalarizer_accuracy,
    "ablation": reward.ablation,
    "training_curves": policy.training_curves,
    "reward_and_truth": policy.reward_and_truth,
    "principle_scores": policy.principle_scores,
    "reward_vs_kl": policy.reward_vs_kl,
    "win_rates": wins.win_rates,
    "win_rate_matrix": wins.win_rate_matrix,
    "sweep": reward.sweep,
}


def draw_figures(tables: RunTables) -> dict[str, bytes]:
    """PNG bytes of every figure that the run has data for."""
    drawn: dict[str, bytes] = {}
    with report_style():
        for name, draw in FIGURES.items():
            figure = draw(tables)
            if figure is not None:
                drawn[name] = to_png(figure)
    return drawn


__all__ = ["FIGURES", "draw_figures"]
