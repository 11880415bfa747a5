"""Stages 5 and 6 of the synthetic run: the arms' curves, their responses, win rates and samples."""

from __future__ import annotations

import math

import numpy as np

from morlaif_ray.artifacts import write_csv, write_json, write_table
from tests.unit.evaluation import synthetic_figures as figures


def write_policies(folder, rng, testbed, arms, num_steps) -> None:
    folder.joinpath("README").write_text("synthetic\n", encoding="utf-8")
    for arm in arms:
        gain, kl, oracle, formed, words = figures.ARM_SHAPES[arm]
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
        for k, name in enumerate(figures.PRINCIPLES):
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


def write_evaluation(folder, rng, testbed, arms, num_prompts, text) -> None:
    columns, csv_rows = _responses(rng, testbed, arms, num_prompts, text)
    write_table(folder / "responses.parquet", columns)
    write_csv(folder / "policies.csv", csv_rows)
    wins = []
    names = [*arms, "sft"]
    strength = {arm: figures.ARM_SHAPES[arm][2] for arm in arms} | {"sft": 0.0}
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
    numeric = [
        "num_words",
        *(f"reward_{arm}" for arm in arms),
        *(f"z_{p}" for p in figures.PRINCIPLES),
    ]
    if testbed:
        numeric += ["oracle_utility", "well_formed", *(f"true_{p}" for p in figures.PRINCIPLES)]
    columns |= {name: [] for name in numeric} | {"truncated": []}
    rows = []
    for policy in ("sft", *arms):
        gain, kl, oracle, formed, words = figures.ARM_SHAPES.get(
            policy, (0.0, 0.0, 0.0, 0.974, 14.3)
        )
        columns["prompt_id"] += [f"p{i:03d}" for i in range(num_prompts)]
        columns["prompt"] += [figures.HUMAN] * num_prompts
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
                p: float(rng.normal()) + (0.8 if policy != "sft" else 0.0)
                for p in figures.PRINCIPLES
            },
            "true_scores": {p: float(rng.uniform()) for p in figures.PRINCIPLES}
            if testbed
            else None,
        }

    return [
        {"prompt": figures.HUMAN, "responses": {policy: one(policy) for policy in ("sft", *arms)}}
        for _ in range(6)
    ]
