"""Stage 4 of the synthetic run: weights, scalarizers, baselines, ablations, and the sweep."""

from __future__ import annotations

import math

from morlaif_ray.artifacts import write_csv, write_json
from tests.unit.evaluation import synthetic_figures as figures


def write_reward(folder, rng, testbed) -> None:
    write_json(
        folder / "weights.json",
        {
            "principles": figures.PRINCIPLES,
            "weights": {
                name: {"weight": w, "low": w - 0.09, "high": w + 0.09}
                for name, w in zip(figures.PRINCIPLES, figures.WEIGHTS, strict=True)
            },
            "fitted": True,
            "num_pairs": 1190,
            "accuracy_train": 0.671,
            "ceiling": {"accuracy": 0.802, "low": 0.783, "high": 0.82, "num": 1790},
            "weights_on_judge": {
                n: 1.6 * w for n, w in zip(figures.PRINCIPLES, figures.WEIGHTS, strict=True)
            },
        },
    )
    entries = [(n, "scalarizer", a, 3560 * 12) for n, a in figures.SCALARIZERS.items()]
    entries += [
        (n, "baseline", a, 3560 * (12 if n == "mean_log_odds" else 1))
        for n, a in figures.BASELINES.items()
    ]
    entries += [("judge_log_odds", "ceiling", 0.802, 3560 * 12)]
    entries += [("noisy_truth", "bayes", 0.826, 0)] if testbed else []
    write_csv(
        folder / "scalarizers.csv",
        [
            {
                "name": name,
                "kind": kind,
                "accuracy": accuracy,
                "low": accuracy - 0.021,
                "high": accuracy + 0.021,
                "num": 1790,
                "num_judgements": judgements,
            }
            for name, kind, accuracy, judgements in entries
        ],
    )
    write_csv(
        folder / "accuracy_difference.csv",
        [
            {
                "scalarizer": s,
                "baseline": b,
                "difference": sa - ba,
                "low": sa - ba - 0.018,
                "high": sa - ba + 0.018,
            }
            for s, sa in figures.SCALARIZERS.items()
            for b, ba in figures.BASELINES.items()
        ],
    )
    write_csv(
        folder / "ablation.csv",
        [
            {"num_removed": n, "accuracy": a, "low": a - 0.02, "high": a + 0.02}
            for n in range(12)
            for a in [0.5 + 0.162 * (1 - (n / 12) ** 2.2)]
        ],
    )
    write_csv(
        folder / "drop_one.csv",
        [
            {
                "principle": name,
                "accuracy_without": 0.662 - 0.03 * abs(w),
                "loss": 0.03 * abs(w) - 0.002,
            }
            for name, w in zip(figures.PRINCIPLES, figures.WEIGHTS, strict=True)
        ],
    )


def write_sweep(folder, rng, testbed) -> None:
    parameters = {
        "soft_max_min": "temperature",
        "lower_quantile": "q",
        "uncertainty_weighted": "lam",
    }
    sweep = []
    for name, accuracy in figures.SCALARIZERS.items():
        for _ in range(48):
            value = float(rng.uniform(0.1, 1.0)) if name in parameters else math.nan
            drift = 0.03 * (value if not math.isnan(value) else 0.5) - 0.02
            sweep.append(
                {
                    "trial": f"t{len(sweep):04d}",
                    "scalarizer": name,
                    "parameter": parameters.get(name, ""),
                    "value": value,
                    "weight_scale": float(rng.lognormal(0, 0.5)),
                    "accuracy_weights": accuracy + drift,
                    "accuracy": accuracy + drift + 0.012 * float(rng.normal()),
                }
            )
    write_csv(folder / "sweep_offline.csv", sweep)
    write_csv(folder / "sweep_online.csv", [])
    best = {
        name: {
            "trial": "t0001",
            "parameters": {parameters[name]: 0.5} if name in parameters else {},
            "accuracy": accuracy + 0.003,
            "low": accuracy - 0.018,
            "high": accuracy + 0.024,
            "num": 1790,
        }
        for name, accuracy in figures.SCALARIZERS.items()
    }
    write_json(folder / "best.json", {"selected_on": "weights", "scalarizers": best})
