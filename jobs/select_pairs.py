"""Part of stage 2: which pairs the judge is asked about (`feedback.select`), where not all of them.

    random:                 a seeded sample
    ensemble_disagreement:  seed set -> ask -> ensemble (one trunk, members x principles heads) -> predictions of all
                            pairs -> those it disagrees most about -> ask -> ...    (morlaif_ray.feedback.selection)

The splits weights and test are always asked in full. What a round chose is written down before it is asked, and answers
are keyed by content in the ledger: after a crash the same command repeats no choice and pays for nothing twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jobs.context import JobContext
from jobs.train_sft import sft_model_path
from morlaif_ray.artifacts import StageFolder, read_json, write_json, write_table
from morlaif_ray.config import Config
from morlaif_ray.config.selecting import SelectAll, SelectByDisagreement
from morlaif_ray.feedback.selection import (
    bootstrap_members,
    choose_pairs,
    disagreement,
    member_columns,
    member_labels,
    member_predictions,
    num_selected,
    random_order,
    round_sizes,
)
from morlaif_ray.seeding import derive_seed
from morlaif_ray.types import FloatArray, Judgement, ResponsePair

Ask = Callable[[Sequence[ResponsePair]], Sequence[Judgement]]
"""Asks the judge about these pairs (recorded answers cost nothing) and gives their judgements."""
SELECTED_SPLIT = "preference"


@dataclass(frozen=True)
class Selection:
    """The pairs to ask about, and how they came to be chosen."""

    pairs: list[ResponsePair]
    """In the order of the stage's input: the chosen ones of split `preference`, and all of the other splits."""
    rounds: dict[str, int] = field(default_factory=dict)
    """pair_id of a chosen pair -> its round, from 0; empty where every pair is asked."""
    disagreement: dict[str, float] = field(default_factory=dict)
    """pair_id -> the ensemble's variance when it was chosen; not there for the seed set and random choices."""

    def write(self, folder: Path) -> None:
        """`selection.parquet` (docs/artifacts.md); nothing where every pair is asked."""
        if not self.rounds:
            return
        columns: dict[str, Sequence[Any]] = {
            "pair_id": list(self.rounds),
            "round": list(self.rounds.values()),
            "disagreement": [self.disagreement.get(name, float("nan")) for name in self.rounds],
        }
        write_table(folder / "selection.parquet", columns)


def selection_recipe(config: Config) -> dict[str, Any]:
    """What the choice depends on beside section `feedback`: goes into the stage's recipe."""
    if config.feedback.select.kind != "ensemble_disagreement":
        return {}
    return {"ensemble": config.preference.model_dump(mode="json")}


def select_pairs(
    context: JobContext,
    stage: StageFolder,
    pairs: Sequence[ResponsePair],
    names: Sequence[str],
    ask: Ask,
) -> Selection:
    """The pairs of stage 2. `names` are the K principles; `ask` is called between the rounds of active selection."""
    select = context.config.feedback.select
    candidates = [pair for pair in pairs if pair.split == SELECTED_SPLIT]
    num = num_selected(select, len(candidates))
    if isinstance(select, SelectAll) or num == len(candidates):
        return Selection(list(pairs))
    context.reporter.line(
        f"feedback.select {select.kind}: {num} of {len(candidates)} pairs of split {SELECTED_SPLIT}"
    )
    seed = derive_seed(context.config.seed, "select")
    order = random_order([pair.pair_id for pair in candidates], seed)
    variances: dict[str, float] = {}
    if isinstance(select, SelectByDisagreement):
        search = _Search(context, stage, select, candidates, names, seed)
        rounds, variances = search.run(order, round_sizes(num, select.rounds), ask)
    else:
        rounds = dict.fromkeys(order[:num], 0)
    chosen = [pair for pair in pairs if pair.split != SELECTED_SPLIT or pair.pair_id in rounds]
    return Selection(chosen, rounds, variances)


@dataclass(frozen=True)
class _Search:
    """The rounds of active selection, written down one by one in the stage's work folder."""

    context: JobContext
    stage: StageFolder
    select: SelectByDisagreement
    candidates: Sequence[ResponsePair]
    names: Sequence[str]
    seed: int

    def run(
        self, order: Sequence[str], sizes: Sequence[int], ask: Ask
    ) -> tuple[dict[str, int], dict[str, float]]:
        """(pair_id -> round, pair_id -> disagreement)."""
        work = self.stage.resumable_work_dir() / "selection"
        work.mkdir(exist_ok=True)
        rounds: dict[str, int] = {}
        variances: dict[str, float] = {}
        for number, size in enumerate(sizes):
            path = work / f"round_{number}.json"
            if not path.is_file():
                write_json(path, self._choose(work, number, rounds, order, size, ask))
            found: Mapping[str, float | None] = read_json(path)
            rounds |= dict.fromkeys(found, number)
            variances |= {name: value for name, value in found.items() if value is not None}
        return rounds, variances

    def _choose(
        self,
        work: Path,
        number: int,
        rounds: Mapping[str, int],
        order: Sequence[str],
        size: int,
        ask: Ask,
    ) -> dict[str, float | None]:
        """The pairs of round `number` with the ensemble's disagreement about them (None in the seed set)."""
        if number == 0:
            return dict.fromkeys(order[:size])
        from morlaif_ray.preference.labels import log_odds_table

        judged = [pair for pair in self.candidates if pair.pair_id in rounds]
        log_odds_NK = log_odds_table(judged, ask(judged), self.names).values_NC
        predictions_MNK = self._predictions(
            work / f"ensemble_{number}", number, judged, log_odds_NK
        )
        pair_ids = [pair.pair_id for pair in self.candidates]
        chosen = choose_pairs(predictions_MNK, pair_ids, rounds, size, self.seed)
        variance = dict(zip(pair_ids, disagreement(predictions_MNK).tolist(), strict=True))
        everyone = float(np.mean(list(variance.values())))
        picked = float(np.mean([variance[name] for name in chosen]))
        self.context.reporter.line(
            f"  round {number + 1} of {self.select.rounds}: {len(chosen)} pairs, mean variance {picked:.4f} "
            f"(all pairs {everyone:.4f})"
        )
        return {name: variance[name] for name in chosen}

    def _predictions(
        self, work: Path, number: int, judged: Sequence[ResponsePair], log_odds_NK: FloatArray
    ) -> FloatArray:
        """Predicted preference of every candidate [M, N, K] by an ensemble trained on the judged pairs."""
        from actors.preference_ensemble import fit_and_score_ensemble

        context, size = self.context, self.select.ensemble_size
        columns = member_columns(self.names, size)
        inside_MN = bootstrap_members([pair.pair_id for pair in judged], size, self.seed)
        labels_NH = member_labels(log_odds_NK, inside_MN)
        recipe = context.config.preference
        context.connect()
        steps = -(-len(judged) // recipe.batch_size) * recipe.num_epochs
        with context.reporter.task(
            f"ensemble for round {number + 1}", total=steps, unit="steps"
        ) as task:
            scores_a, scores_b = fit_and_score_ensemble(
                context.config,
                work,
                judged=_texts(judged),
                pair_ids=[pair.pair_id for pair in judged],
                columns=columns,
                log_odds_NH=labels_NH,
                candidates=_texts(self.candidates),
                backbone=recipe.backbone or sft_model_path(context),
                advance=task.advance,
                say=context.reporter.line,
            )
        return member_predictions(scores_a, scores_b, size)


def _texts(pairs: Sequence[ResponsePair]) -> list[tuple[str, str]]:
    from morlaif_ray.backbone.dialogue import dialogue_text

    return [
        (dialogue_text(pair.prompt, pair.response_a), dialogue_text(pair.prompt, pair.response_b))
        for pair in pairs
    ]
