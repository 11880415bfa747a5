"""Stage 3: one preference model per principle (or one shared trunk), the single-objective baselines, their scores."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actors.engines import check_panel_engine
from jobs.checks import remote_address
from jobs.context import JobContext
from jobs.preference_tables import accuracy_rows, calibration_rows
from jobs.train_sft import sft_model_path
from morlaif_ray.artifacts import read_records, read_table, write_csv, write_json, write_table
from morlaif_ray.backbone.dialogue import dialogue_text
from morlaif_ray.config import Config
from morlaif_ray.evaluation.statistics import measures_length
from morlaif_ray.preference.labels import LogOddsTable, check_trainable, log_odds_table, targets
from morlaif_ray.principles import load_principles
from morlaif_ray.types import FloatArray, Judgement, ResponsePair

STAGE = "3_preference_models"
TRUNK = "trunk"


def run(context: JobContext) -> None:
    stage = context.stage(STAGE, sections=["preference"], inputs=["0_sft", "1_pairs", "2_feedback"])
    if stage.is_current():
        context.reporter.skipped(STAGE)
        return
    config = context.config
    check_panel_engine(config, here=remote_address(config) is None)
    work = stage.resumable_work_dir()
    pairs = read_records(context.path("1_pairs", "pairs.parquet"), ResponsePair)
    table = _labels(context, pairs)
    trainings = plan_trainings(config, table.columns)
    _write_training_data(work, pairs, table, config)
    _train(context, work, trainings)
    principles = _principles(config)
    card = _panel_card(config, principles, table, pairs)
    write_json(work / "panel.json", card)
    _score_everything(context, work, pairs, config.preference.baselines)
    _finish(context, work, card, pairs, table)
    with stage.writing({"models": len(trainings), "pairs": len(pairs)}) as folder:
        for name in ("panel.json", "accuracy.csv", "calibration.csv", "training.csv"):
            shutil.copy2(work / name, folder / name)
        for name in ("weights", "test", "reference"):
            shutil.copy2(work / f"scores_{name}.parquet", folder / f"scores_{name}.parquet")
        shutil.copytree(work / "models", folder / "models", ignore=shutil.ignore_patterns(".*"))
    shutil.rmtree(work)


def _principles(config: Config) -> list[str]:
    chosen = load_principles(config.feedback.principles, config.feedback.principles_dir)
    return [principle.name for principle in chosen]


def _labels(context: JobContext, pairs: Sequence[ResponsePair]) -> LogOddsTable:
    """Log-odds of every pair; baselines without a single label (no human chose) are left out, with a note."""
    config = context.config
    judgements = read_records(context.path("2_feedback", "judgements.parquet"), Judgement)
    return log_odds_table(pairs, judgements, _principles(config), config.preference.baselines)


def plan_trainings(config: Config, columns: Sequence[str]) -> dict[str, list[str]]:
    """Name of each training -> its label columns (one head each)."""
    principles = [name for name in columns if not name.startswith("baseline_")]
    baselines = [name for name in columns if name.startswith("baseline_")]
    together = config.preference.trains_together
    plan = {TRUNK: principles} if together else {name: [name] for name in principles}
    return plan | {name: [name] for name in baselines}


def _write_training_data(
    work: Path, pairs: Sequence[ResponsePair], table: LogOddsTable, config: Config
) -> None:
    rows = [i for i, pair in enumerate(pairs) if pair.split == "preference"]
    for index, name in enumerate(table.columns):
        labels, _ = targets(table.values_NC[rows, index], config.preference.loss)
        check_trainable(name, labels)
    columns: dict[str, Any] = {
        "pair_id": [pairs[i].pair_id for i in rows],
        "text_a": [dialogue_text(pairs[i].prompt, pairs[i].response_a) for i in rows],
        "text_b": [dialogue_text(pairs[i].prompt, pairs[i].response_b) for i in rows],
    }
    columns |= {name: table.values_NC[rows, index] for index, name in enumerate(table.columns)}
    write_table(work / "train.parquet", columns)


def _train(context: JobContext, work: Path, trainings: dict[str, list[str]]) -> None:
    from actors.preference_trials import fit_preference_models

    config = context.config
    num_pairs = len(read_table(work / "train.parquet")["pair_id"])
    per_epoch = -(-num_pairs // config.preference.batch_size)
    total = per_epoch * config.preference.num_epochs * len(trainings)
    context.connect()
    label = f"{len(trainings)} preference models"
    with context.reporter.task(label, total=total, unit="steps") as task:
        fit_preference_models(
            config, work, trainings, _backbone(context), task.advance, context.reporter.line
        )


def _backbone(context: JobContext) -> str:
    return context.config.preference.backbone or sft_model_path(context)


def _panel_card(
    config: Config, principles: Sequence[str], table: LogOddsTable, pairs: Sequence[ResponsePair]
) -> dict[str, Any]:
    shared = config.preference.trains_together
    models = {
        name: {"folder": f"models/{TRUNK if shared else name}", "head": index if shared else 0}
        for index, name in enumerate(principles)
    }
    baselines = {
        name: {"folder": f"models/baseline_{name}", "head": 0}
        for name in config.preference.baselines
        if name != "best_principle"
    }
    if "best_principle" in config.preference.baselines:
        best = _best_principle(principles, table, pairs)
        baselines["best_principle"] = {**models[best], "principle": best}
    return {
        "topology": config.preference.topology,
        "principles": list(principles),
        "models": models,
        "baselines": baselines,
    }


def _best_principle(
    principles: Sequence[str], table: LogOddsTable, pairs: Sequence[ResponsePair]
) -> str:
    """The principle whose judgements agree most with people on the training split (the test split stays unseen)."""
    human = np.array([p.human_label if p.split == "preference" else np.nan for p in pairs])
    shares = []
    for name in principles:
        log_odds = table.column(name)
        seen = ~np.isnan(human) & ~np.isnan(log_odds) & (log_odds != 0)
        agree = (log_odds[seen] > 0) == (human[seen] > 0.5)
        shares.append(float(agree.mean()) if seen.any() else 0.0)
    return principles[int(np.argmax(shares))]


def _score_everything(
    context: JobContext, work: Path, pairs: Sequence[ResponsePair], baselines: Sequence[str]
) -> None:
    """Raw scores of both responses of the splits weights and test, and of the SFT reference responses."""
    from actors.preference_panel import PreferencePanel, panel_columns

    reference = read_table(context.path("1_pairs", "reference.parquet"))
    texts = {
        "reference": [
            dialogue_text(p, r)
            for p, r in zip(reference["prompt"], reference["response"], strict=True)
        ]
    }
    chosen = {split: [p for p in pairs if p.split == split] for split in ("weights", "test")}
    for split, members in chosen.items():
        texts[f"{split}_a"] = [dialogue_text(p.prompt, p.response_a) for p in members]
        texts[f"{split}_b"] = [dialogue_text(p.prompt, p.response_b) for p in members]
    panel = PreferencePanel(
        context.config,
        panel_columns(work, baselines),
        context.reporter.line,
        num_actors=context.config.preference.scoring_actors,
    )
    scores: dict[str, FloatArray] = {}
    with context.reporter.task("scores", total=sum(map(len, texts.values())), unit="texts") as task:
        for name, batch in texts.items():
            parts = []
            for start in range(0, len(batch), 2048):
                parts.append(panel.score(batch[start : start + 2048]).scores_BK)
                task.advance(len(parts[-1]))
            scores[name] = np.concatenate(parts)
    names = [column.name for column in panel.columns]
    panel.close()
    write_table(
        work / "scores_reference.parquet",
        {**reference, **{name: scores["reference"][:, i] for i, name in enumerate(names)}},
    )
    for split, members in chosen.items():
        columns: dict[str, Any] = {
            "pair_id": [p.pair_id for p in members],
            "prompt_id": [p.prompt_id for p in members],
            "human_label": [p.human_label for p in members],
        }
        for index, name in enumerate(names):
            columns[f"a_{name}"] = scores[f"{split}_a"][:, index]
            columns[f"b_{name}"] = scores[f"{split}_b"][:, index]
        write_table(work / f"scores_{split}.parquet", columns)


def _finish(
    context: JobContext,
    work: Path,
    card: dict[str, Any],
    pairs: Sequence[ResponsePair],
    table: LogOddsTable,
) -> None:
    """Fits the normalisers, measures accuracy on the test split, and writes the tables that people read."""
    reference = read_table(work / "scores_reference.parquet")

    def moments(name: str) -> dict[str, float]:
        values = np.array(reference[name])
        return {"mean": float(values.mean()), "std": float(values.std(ddof=1)), "num": len(values)}

    card["normaliser"] = {name: moments(name) for name in card["principles"]}
    card["baseline_normaliser"] = {name: moments(f"baseline_{name}") for name in card["baselines"]}
    rows = accuracy_rows(work, card, pairs, table, context.config)
    write_csv(work / "accuracy.csv", rows)
    calibration = calibration_rows(work, card, pairs, table, context.config.seed)
    write_csv(work / "calibration.csv", calibration)
    card["temperature"] = {row["model"]: row["temperature"] for row in calibration}
    write_json(work / "panel.json", card)
    losses = []
    for path in sorted((work / "losses").glob("*.csv")):
        header, *lines = path.read_text(encoding="utf-8").splitlines()
        losses += [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]
    write_csv(work / "training.csv", losses)
    for row in rows:
        if row["label"] == "judge" and row["kind"] == "principle":
            context.reporter.line(
                f"  {row['model']}: accuracy {row['accuracy']:.3f} [{row['low']:.3f}, {row['high']:.3f}] "
                f"on {row['num']} held-out judgements"
            )
            if measures_length(row["length_correlation"]):
                context.reporter.line(
                    f"  {row['model']}: its scores follow the length of the response (correlation "
                    f"{row['length_correlation']:+.2f}); look at its judgements before you trust it"
                )
