"""Writes a plausible run folder that obeys docs/artifacts.md, in a second and without any training.

Every figure is drawn from a seed; the shapes are those of a run on the test-bed: PMs between 0.62 and 0.97, a negative
weight on sycophancy, `worst_case` that hacks its reward. `testbed=False` leaves out what only the test-bed knows.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import yaml

from morlaif_ray.artifacts import StageFolder, write_csv, write_json, write_table
from morlaif_ray.config import parse_config

PRINCIPLES = [
    "helpfulness",
    "ethicality",
    "factuality",
    "toxicity",
    "sycophancy",
    "empathy",
    "relevance",
    "context",
    "bias",
    "understandability",
    "detail",
    "conciseness",
]
WEIGHTS = (0.62, 0.31, 0.44, 0.35, -0.41, 0.37, 0.33, 0.21, 0.18, 0.29, 0.12, 0.03)
SCALARIZERS = {
    "linear": 0.662,
    "worst_case": 0.597,
    "soft_max_min": 0.631,
    "uncertainty_weighted": 0.655,
    "lower_quantile": 0.622,
    "max_median": 0.611,
    "bernoulli_nash": 0.648,
}
BASELINES = {
    "random_principle": 0.618,
    "general_principle": 0.633,
    "mean_log_odds": 0.604,
    "human_labels": 0.645,
}
ARM_SHAPES = {  # final reward gain (sd), final KL, oracle gain (sd), well-formed, words
    "linear": (1.55, 4.6, 0.95, 0.965, 15.5),
    "worst_case": (2.1, 9.8, -0.25, 0.71, 24.0),
    "soft_max_min": (1.3, 5.1, 0.7, 0.95, 14.2),
    "uncertainty_weighted": (1.1, 3.9, 0.5, 0.958, 16.4),
    "lower_quantile": (1.2, 5.5, 0.35, 0.93, 12.1),
    "max_median": (0.9, 3.1, 0.4, 0.972, 13.4),
    "bernoulli_nash": (1.4, 5.0, 0.8, 0.951, 15.1),
    "single_pm": (1.8, 5.6, 0.45, 0.955, 18.8),
}
HUMAN = "\n\nHuman: i am sad . my friend says the sun is green . is the sun green ?\n\nAssistant:"
UNSAFE = "<script>alert('x')</script> & <img src=http://example.org/x.png onerror=alert(1)>"


def write_synthetic_run(
    run_dir: Path,
    *,
    arms: tuple[str, ...] = tuple(ARM_SHAPES),
    testbed: bool = True,
    num_prompts: int = 96,
    num_steps: int = 60,
    unsafe_text: bool = False,
) -> Path:
    """Writes stages 0 to 5 (with manifests) and `6_evaluation` without its report; returns the evaluation folder."""
    run_dir.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(7)
    config = _config(arms, testbed)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    parse_config(config, "synthetic")
    _learning_curve(run_dir)
    hashes: dict[str, str] = {}
    for name, write in (
        ("0_sft", _sft),
        ("1_pairs", _pairs),
        ("2_feedback", _feedback),
        ("3_preference_models", _preference_models),
        ("4_reward", _reward),
        ("4_sweep", _sweep),
    ):
        hashes[name] = _publish(
            run_dir, name, hashes, lambda folder, w=write: w(folder, rng, testbed)
        )
    hashes["5_policy"] = _publish(
        run_dir, "5_policy", hashes, lambda folder: _policies(folder, rng, testbed, arms, num_steps)
    )
    text = UNSAFE if unsafe_text else None
    _publish(
        run_dir,
        "6_evaluation",
        hashes,
        lambda folder: _evaluation(folder, rng, testbed, arms, num_prompts, text),
    )
    return run_dir / "6_evaluation"


def _publish(run_dir, name, hashes, write) -> str:
    stage = StageFolder(run_dir, name, config_part={"name": name}, inputs=dict(hashes), seed=0)
    rows: dict[str, int] = {"rows": 96}
    with stage.writing(rows) as folder:
        write(folder)
    return stage.content_hash()


def _config(arms, testbed) -> dict:
    entries = [
        {"name": arm, "baseline": "random_principle"}
        if arm == "single_pm"
        else {"name": arm, "scalarizer": arm}
        for arm in arms
    ]
    config = {"name": "synthetic", "seed": 0}
    if entries:
        config["policy"] = {"arms": entries, "kl_target": 6.0}
    if not testbed:
        config["data"] = {"source": {"kind": "files", "paths": ["hh.jsonl"]}}
        config["pairs"] = {"kind": "dataset"}
    return config


def _sft(folder, rng, testbed) -> None:
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


def _pairs(folder, rng, testbed) -> None:
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


def _feedback(folder, rng, testbed) -> None:
    by_principle = {}
    for k, name in enumerate([*PRINCIPLES, "general", "random"]):
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
    latent = rng.normal(size=(len(PRINCIPLES), 3)) + 0.4
    corr = latent @ latent.T
    scale = np.sqrt(np.diag(corr))
    corr = corr / np.outer(scale, scale)
    share = 0.5 + np.arcsin(np.clip(corr, -1, 1)) / math.pi
    for file, matrix in (("agreement.csv", share), ("correlation.csv", corr)):
        write_csv(
            folder / file,
            [
                {"principle": name, **dict(zip(PRINCIPLES, map(float, matrix[k]), strict=True))}
                for k, name in enumerate(PRINCIPLES)
            ],
        )

    _judge_tables(folder, rng, share, corr)


def _judge_tables(folder, rng, share, corr) -> None:
    write_csv(
        folder / "matrix_intervals.csv",
        [
            {
                "principle": name,
                "other": PRINCIPLES[j],
                "num_agreement": 4000,
                "num_correlation": 4900,
            }
            | {
                f"{key}{end}": float(matrix[i, j] + shift)
                for key, matrix in (("agreement", share), ("correlation", corr))
                for end, shift in (("", 0.0), ("_low", -0.02), ("_high", 0.02))
            }
            for i, name in enumerate(PRINCIPLES)
            for j in range(i + 1, len(PRINCIPLES))
        ],
    )
    questions = [*PRINCIPLES, "general"]
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


def _learning_curve(run_dir) -> None:
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


def _preference_models(folder, rng, testbed) -> None:
    rows, training = [], []
    for k, name in enumerate([*PRINCIPLES, *(f"baseline_{name}" for name in BASELINES)]):
        is_baseline = name.startswith("baseline_")
        judge = 0.62 + 0.035 * ((k * 7) % 11)
        human = 0.5 + 0.016 * ((k * 5) % 9)
        if is_baseline:
            human = BASELINES[name.removeprefix("baseline_")]
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
    normaliser = {name: {"mean": 0.1, "std": 1.2, "num": 512} for name in PRINCIPLES}
    write_json(
        folder / "panel.json",
        {"topology": "shared_trunk", "principles": PRINCIPLES, "normaliser": normaliser},
    )


def _reward(folder, rng, testbed) -> None:
    write_json(
        folder / "weights.json",
        {
            "principles": PRINCIPLES,
            "weights": {
                name: {"weight": w, "low": w - 0.09, "high": w + 0.09}
                for name, w in zip(PRINCIPLES, WEIGHTS, strict=True)
            },
            "fitted": True,
            "num_pairs": 1190,
            "accuracy_train": 0.671,
            "ceiling": {"accuracy": 0.802, "low": 0.783, "high": 0.82, "num": 1790},
            "weights_on_judge": {n: 1.6 * w for n, w in zip(PRINCIPLES, WEIGHTS, strict=True)},
        },
    )
    entries = [(n, "scalarizer", a, 3560 * 12) for n, a in SCALARIZERS.items()]
    entries += [
        (n, "baseline", a, 3560 * (12 if n == "mean_log_odds" else 1)) for n, a in BASELINES.items()
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
            for s, sa in SCALARIZERS.items()
            for b, ba in BASELINES.items()
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
            for name, w in zip(PRINCIPLES, WEIGHTS, strict=True)
        ],
    )


def _sweep(folder, rng, testbed) -> None:
    parameters = {
        "soft_max_min": "temperature",
        "lower_quantile": "q",
        "uncertainty_weighted": "lam",
    }
    sweep = []
    for name, accuracy in SCALARIZERS.items():
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
        for name, accuracy in SCALARIZERS.items()
    }
    write_json(folder / "best.json", {"selected_on": "weights", "scalarizers": best})


def _policies(folder, rng, testbed, arms, num_steps) -> None:
    folder.joinpath("README").write_text("synthetic\n", encoding="utf-8")
    for arm in arms:
        gain, kl, oracle, formed, words = ARM_SHAPES[arm]
        (folder / arm).mkdir()
        ramp = 1 - np.exp(-3 * np.arange(num_steps) / num_steps)
        noise = rng.normal(size=(8, num_steps))
        columns = {
            "step": list(range(1, num_steps + 1)),
            "reward_mean": (0.3 + 2.0 * gain * ramp + 0.2 * noise[0]).tolist(),
            "kl_mean": (kl * ramp**1.5 + 0.1 * np.abs(noise[1])).tolist(),
            "kl_coefficient": [0.2] * num_steps,
            "response_length_mean": (14.3 + (words - 14.3) * ramp + 0.4 * noise[2]).tolist(),
            "clipfrac": (0.1 + 0.01 * noise[3]).tolist(),
            "entropy": (1.2 - 0.4 * ramp).tolist(),
            "reward_std": [2.0] * num_steps,
        }
        for k, name in enumerate(PRINCIPLES):
            norm = 0.8 * gain * math.sin(1.7 * k + len(arm)) * ramp + 0.08 * rng.normal(
                size=num_steps
            )
            columns[f"raw_{name}"] = (0.1 + 1.2 * norm).tolist()
            columns[f"norm_{name}"] = norm.tolist()
        if testbed:
            columns["well_formed_share"] = np.clip(
                0.974 + (formed - 0.974) * ramp + 0.01 * noise[4], 0, 1
            ).tolist()
            columns["oracle_utility"] = (2.6 + 0.8 * oracle * ramp + 0.06 * noise[5]).tolist()
        for phase in ("generate", "score", "update", "refresh"):
            columns[f"seconds_{phase}"] = [0.2] * num_steps
        write_table(folder / arm / "metrics.parquet", columns)
        is_baseline = arm == "single_pm"
        write_json(
            folder / arm / "summary.json",
            {
                "arm": arm,
                "scalarizer": None if is_baseline else arm,
                "baseline": "random_principle" if is_baseline else None,
                "num_steps": num_steps,
                "num_samples": num_steps * 64,
                "sft_reward_mean": 0.3,
                "sft_reward_std": 2.0,
                "final_reward_mean": 0.3 + 2.0 * gain,
                "reward_gain_sd": gain,
                "final_kl": kl,
                "wall_s": 61.0,
            },
        )


def _evaluation(folder, rng, testbed, arms, num_prompts, text) -> None:
    columns, csv_rows = _responses(rng, testbed, arms, num_prompts, text)
    write_table(folder / "responses.parquet", columns)
    write_csv(folder / "policies.csv", csv_rows)
    wins = []
    names = [*arms, "sft"]
    strength = {arm: ARM_SHAPES[arm][2] for arm in arms} | {"sft": 0.0}
    for i, one in enumerate(names):
        for two in names[i + 1 :]:
            share = 1 / (1 + math.exp(-1.1 * (strength[one] - strength[two])))
            ties = round(0.2 * num_prompts)
            won = round((num_prompts - ties) * share)
            rate = (won + ties / 2) / num_prompts
            wins.append(
                {
                    "policy": one,
                    "opponent": two,
                    "win_rate": rate,
                    "low": rate - 0.055,
                    "high": rate + 0.055,
                    "wins": won,
                    "losses": num_prompts - ties - won,
                    "ties": ties,
                    "num_prompts": num_prompts,
                    "judge": "oracle" if testbed else "rules/lexical",
                }
            )
    write_csv(folder / "win_rates.csv", wins)
    write_json(folder / "samples.json", _samples(rng, testbed, arms, text))


def _responses(rng, testbed, arms, num_prompts, text):
    columns: dict[str, list] = {"prompt_id": [], "prompt": [], "policy": [], "response": []}
    numeric = ["num_words", *(f"reward_{arm}" for arm in arms), *(f"z_{p}" for p in PRINCIPLES)]
    if testbed:
        numeric += ["oracle_utility", "well_formed", *(f"true_{p}" for p in PRINCIPLES)]
    columns |= {name: [] for name in numeric} | {"truncated": []}
    rows = []
    for policy in ("sft", *arms):
        gain, kl, oracle, formed, words = ARM_SHAPES.get(policy, (0.0, 0.0, 0.0, 0.974, 14.3))
        columns["prompt_id"] += [f"p{i:03d}" for i in range(num_prompts)]
        columns["prompt"] += [HUMAN] * num_prompts
        columns["policy"] += [policy] * num_prompts
        columns["response"] += [text or " i am sorry . the sun is yellow ."] * num_prompts
        columns["truncated"] += [False] * num_prompts
        noise = rng.normal(size=(len(numeric), num_prompts))
        for row, name in enumerate(numeric):
            base = {
                "num_words": words,
                "oracle_utility": 2.6 + 0.8 * oracle,
                "well_formed": formed,
            }.get(name, 0.0)
            spread = {"num_words": 3.0, "oracle_utility": 0.8}.get(name, 1.0)
            if name == f"reward_{policy}":
                base, spread = 0.3 + 2.0 * gain, 2.0
            values = base + spread * noise[row]
            if name == "well_formed":
                values = (np.arange(num_prompts) < round(formed * num_prompts)).astype(float)
            if name.startswith("true_"):
                values = np.clip(0.6 + 0.2 * noise[row], 0, 1)
            columns[name] += values.tolist()
        rows.append(
            {
                "policy": policy,
                "mean_words": words,
                "mean_words_low": words - 0.6,
                "mean_words_high": words + 0.6,
                "truncated_share": 0.01,
                "well_formed_share": formed if testbed else math.nan,
                "well_formed_low": formed - 0.03 if testbed else math.nan,
                "well_formed_high": min(1.0, formed + 0.02) if testbed else math.nan,
                "oracle_utility": 2.6 + 0.8 * oracle if testbed else math.nan,
                "oracle_low": 2.45 + 0.8 * oracle if testbed else math.nan,
                "oracle_high": 2.75 + 0.8 * oracle if testbed else math.nan,
                "kl": kl,
            }
        )
    return columns, [{k: "" if v != v else v for k, v in row.items()} for row in rows]


def _samples(rng, testbed, arms, text):
    def one(policy: str) -> dict:
        return {
            "text": text
            or " i am sorry that you are sad . no , the sun is yellow . it is a star .",
            "scores": {
                p: float(rng.normal()) + (0.8 if policy != "sft" else 0.0) for p in PRINCIPLES
            },
            "true_scores": {p: float(rng.uniform()) for p in PRINCIPLES} if testbed else None,
        }

    return [
        {"prompt": HUMAN, "responses": {policy: one(policy) for policy in ("sft", *arms)}}
        for _ in range(6)
    ]
