"""Stages 0 to 3 of the synthetic run: target model, pairs, judge, preference models."""

from __future__ import annotations

import math

import numpy as np

from morlaif_ray.artifacts import write_csv, write_json
from tests.unit.evaluation import synthetic_figures as figures


def write_sft(folder, rng, testbed) -> None:
    steps = range(0, 800, 10)
    loss = [0.55 + 3.6 * math.exp(-step / 120) + 0.02 * rng.normal() for step in steps]
    write_csv(
        folder / "training.csv",
        [
            {"step": step, "loss": loss[i], "learning_rate": 4e-3 * (1 - step / 800)}
            for i, step in enumerate(steps)
        ],
    )
    write_json(
        folder / "metrics.json",
        {
            "num_parameters": 349_248,
            "num_dialogues": 4200,
            "final_loss": 0.551,
            "heldout_loss": 0.574,
        },
    )
    (folder / "bad_rows.jsonl").write_text("", encoding="utf-8")


def write_pairs(folder, rng, testbed) -> None:
    write_json(
        folder / "metrics.json",
        {
            "num_pairs": 6540,
            "num_identical": 112,
            "num_by_split": {"preference": 3560, "weights": 1190, "test": 1790},
            "well_formed_share": 0.974 if testbed else math.nan,
            "mean_response_words": 14.3,
        },
    )


def write_feedback(folder, rng, testbed) -> None:
    by_principle = {}
    for k, name in enumerate([*figures.PRINCIPLES, "general", "random"]):
        agreement = 0.5 + 0.02 * ((k * 5) % 9) - (0.06 if name == "sycophancy" else 0.0)
        by_principle[name] = {
            "usable": 5600 - 40 * k,
            "ties": 880 + 35 * k,
            "unusable": 13 + k,
            "mean_position_bias": 0.4 + 0.03 * float(rng.normal()),
            "human_agreement": agreement,
            "human_agreement_low": agreement - 0.012,
            "human_agreement_high": agreement + 0.012,
            "num_human": 5400,
            "calibration_error": 0.05 + 0.01 * (k % 5),
            "overconfidence": 0.04 + 0.01 * (k % 5),
        }
    write_json(
        folder / "summary.json",
        {
            "judge": "rules/testbed",
            "num_questions": 183_120,
            "num_judgements": 91_560,
            "num_usable": 78_000,
            "num_ties": 13_200,
            "num_unusable": 300,
            "num_failed": 60,
            "tokens": 0,
            "cost_usd": 0.0,
            "by_principle": by_principle,
        },
    )
    latent = rng.normal(size=(len(figures.PRINCIPLES), 3)) + 0.4
    corr = latent @ latent.T
    scale = np.sqrt(np.diag(corr))
    corr = corr / np.outer(scale, scale)
    share = 0.5 + np.arcsin(np.clip(corr, -1, 1)) / math.pi
    for file, matrix in (("agreement.csv", share), ("correlation.csv", corr)):
        write_csv(
            folder / file,
            [
                {
                    "principle": name,
                    **dict(zip(figures.PRINCIPLES, map(float, matrix[k]), strict=True)),
                }
                for k, name in enumerate(figures.PRINCIPLES)
            ],
        )

    _judge_tables(folder, rng, share, corr)


def _judge_tables(folder, rng, share, corr) -> None:
    write_csv(
        folder / "matrix_intervals.csv",
        [
            {
                "principle": name,
                "other": figures.PRINCIPLES[j],
                "num_agreement": 4000,
                "num_correlation": 4900,
            }
            | {
                f"{key}{end}": float(matrix[i, j] + shift)
                for key, matrix in (("agreement", share), ("correlation", corr))
                for end, shift in (("", 0.0), ("_low", -0.02), ("_high", 0.02))
            }
            for i, name in enumerate(figures.PRINCIPLES)
            for j in range(i + 1, len(figures.PRINCIPLES))
        ],
    )
    questions = [*figures.PRINCIPLES, "general"]
    biases = [0.4 + 0.03 * float(rng.normal()) for _ in questions]
    write_csv(
        folder / "position_bias.csv",
        [
            {
                "principle": name,
                "mean": bias,
                "low": bias - 0.01,
                "high": bias + 0.01,
                "num": 5600,
                "flipped_ab": 0.07 + 0.002 * k,
                "flipped_ba": 0.07,
                "order_dependent": 0.14 + 0.002 * k,
                "order_dependent_low": 0.13 + 0.002 * k,
                "order_dependent_high": 0.15 + 0.002 * k,
                "num_decided": 4700,
            }
            for k, (name, bias) in enumerate(zip(questions, biases, strict=True))
        ],
    )
    write_csv(
        folder / "calibration.csv",
        [
            {
                "principle": name,
                "low": low,
                "high": low + 0.05,
                "count": 900 - 60 * b,
                "confidence": low + 0.025,
                "agreement": 0.5 + (low - 0.475) * (1.0 - 0.1 * (k % 6)),
                "agreement_low": 0.47 + (low - 0.475) * (1.0 - 0.1 * (k % 6)),
                "agreement_high": 0.53 + (low - 0.475) * (1.0 - 0.1 * (k % 6)),
            }
            for k, name in enumerate(questions)
            for b in range(10)
            for low in [0.5 + 0.05 * b]
        ],
    )


def write_learning_curve(run_dir) -> None:
    rows = []
    for strategy, gain in (("random", 0.0), ("ensemble_disagreement", 0.01)):
        for n in (100, 200, 400, 800):
            accuracy = 0.6 + 0.05 * math.log2(n / 100) + gain
            rows.append(
                {"strategy": strategy, "num_pairs": n, "num_judgements": 12 * n}
                | {"accuracy": accuracy, "low": accuracy - 0.02, "high": accuracy + 0.02}
                | {"difference": gain, "difference_low": -0.01, "difference_high": 0.03}
                | {"num_seeds": 3}
            )
    write_csv(run_dir / "learning_curve.csv", rows)


def write_preference_models(folder, rng, testbed) -> None:
    rows, training = [], []
    for k, name in enumerate(
        [*figures.PRINCIPLES, *(f"baseline_{name}" for name in figures.BASELINES)]
    ):
        is_baseline = name.startswith("baseline_")
        judge = 0.62 + 0.035 * ((k * 7) % 11)
        human = 0.5 + 0.016 * ((k * 5) % 9)
        if is_baseline:
            human = figures.BASELINES[name.removeprefix("baseline_")]
        for label, accuracy in (("judge", judge), ("human", human)):
            if is_baseline and name.endswith("human_labels") and label == "judge":
                continue
            rows.append(
                {
                    "model": name.removeprefix("baseline_"),
                    "kind": "baseline" if is_baseline else "principle",
                    "label": label,
                    "accuracy": accuracy,
                    "low": accuracy - 0.022,
                    "high": accuracy + 0.022,
                    "num": 1600,
                    "num_judgements": 3560 * (12 if name.endswith("mean_log_odds") else 1),
                    "length_correlation": 0.8 * math.sin(k),
                }
            )
        for step in range(0, 220, 10):
            loss = 0.69 - (judge - 0.5) * (1 - math.exp(-step / 70)) + 0.008 * rng.normal()
            training.append({"model": name, "step": step, "loss": float(loss)})
    write_csv(folder / "accuracy.csv", rows)
    write_csv(folder / "training.csv", training)
    normaliser = {name: {"mean": 0.1, "std": 1.2, "num": 512} for name in figures.PRINCIPLES}
    write_json(
        folder / "panel.json",
        {"topology": "shared_trunk", "principles": figures.PRINCIPLES, "normaliser": normaliser},
    )
