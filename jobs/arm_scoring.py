"""From the responses of one arm to its scalar reward: panel, scalarizer, missing scores, and what is logged of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.preference_panel import Missing, PendingScores, PreferencePanel
from actors.stored_rollouts import Told
from jobs.context import JobContext
from morlaif_ray.backbone.dialogue import dialogue_text
from morlaif_ray.config.learning import ArmConfig
from morlaif_ray.errors import ScalarizerError
from morlaif_ray.reward.function import RewardFunction
from morlaif_ray.types import FloatArray, RolloutBatch

Responses = RolloutBatch | Told
"""What scoring reads of a batch: texts, and which were cut off."""
NUM_SAMPLES = 6


@dataclass(frozen=True)
class ScoredBatch:
    """Rewards of a rollout batch with the vector that they came from."""

    reward_B: FloatArray
    raw_BK: FloatArray
    normalised_BK: FloatArray


class ArmScorer:
    """The reward of one arm. Used by one thread at a time."""

    def __init__(self, context: JobContext, config: ArmConfig, panel: PreferencePanel) -> None:
        self._context = context
        self._name = config.name
        self._panel = panel
        self._missing = self._scores = 0
        weights_json = context.path("4_reward", "weights.json")
        settings = context.config.reward
        self._all_principles = RewardFunction.from_artifacts(weights_json, "linear", settings)
        if config.scalarizer is not None:
            self.reward = RewardFunction.from_artifacts(weights_json, config.scalarizer, settings)
        else:
            panel_json = context.path("3_preference_models", "panel.json")
            self.reward = RewardFunction.for_baseline(panel_json, str(config.baseline))
        rewarded = self.reward.principles if config.scalarizer else (f"baseline_{config.baseline}",)
        self.columns = tuple(dict.fromkeys([*self._all_principles.principles, *rewarded]))
        """The panel's columns that this arm needs: models behind others do no work for it."""
        self._missing_scores: Missing = "error" if settings.missing == "error" else "mark"
        self._reward_columns = [self.columns.index(name) for name in rewarded]
        self._principle_columns = [
            self.columns.index(name) for name in self._all_principles.principles
        ]

    def score(self, batch: Responses, raw_BK: FloatArray | None = None) -> ScoredBatch:
        """Scalar rewards, from the panel's scores where they are known already; stops when too many are missing."""
        raw = self.submit(texts_of(batch)).result().scores_BK if raw_BK is None else raw_BK
        result = self.reward(raw[:, self._reward_columns])
        self._missing += result.num_missing
        self._scores += result.num_scores
        limit = self._context.config.reward.max_missing_share
        if self._missing > limit * self._scores:
            raise ScalarizerError(
                f"arm '{self._name}': {self._missing} of {self._scores} scores are missing, more than "
                f"reward.max_missing_share ({limit:g}) allows"
            )
        penalty = self._context.config.policy.truncation_penalty
        principles = raw[:, self._principle_columns]
        return ScoredBatch(
            result.reward_B - penalty * batch.truncated_B,
            principles,
            self._all_principles.normaliser.apply(principles),
        )

    def state(self) -> dict[str, int]:
        """Scores so far and how many of them were missing: what `max_missing_share` is held against."""
        return {"num_missing": self._missing, "num_scores": self._scores}

    def restore(self, state: Mapping[str, int]) -> None:
        """Back to what `state` gave at a checkpoint; {}: to the start."""
        self._missing, self._scores = state.get("num_missing", 0), state.get("num_scores", 0)

    def submit(self, texts: Sequence[str]) -> PendingScores:
        """The arm's columns of dialogues, under way; NaN where one is missing and the config allows that."""
        return self._panel.submit(texts, self.columns, missing=self._missing_scores)

    def observations(self, batch: Responses, scored: ScoredBatch) -> dict[str, float]:
        """What is logged beside the update: scores per principle, and on the test-bed the truth."""
        values = {"reward_std": float(scored.reward_B.std())}
        for index, name in enumerate(self.principles):
            values[f"raw_{name}"] = float(np.nanmean(scored.raw_BK[:, index]))
            values[f"norm_{name}"] = float(np.nanmean(scored.normalised_BK[:, index]))
        if self._context.config.on_testbed:
            from morlaif_ray.testbed import human_utility, read_response

            texts = list(zip(batch.prompts, batch.responses, strict=True))
            values["oracle_utility"] = float(np.mean([human_utility(*text) for text in texts]))
            values["well_formed_share"] = float(
                np.mean([read_response(*t).well_formed for t in texts])
            )
        return values

    def sample_table(
        self, batch: Responses, scored: ScoredBatch
    ) -> tuple[list[str], list[list[str]]]:
        """(columns, rows) of some responses with their reward and normalised scores."""
        columns = ["prompt", "response", "reward", *self.principles]
        rows = []
        for index in range(min(NUM_SAMPLES, len(batch))):
            figures = [scored.reward_B[index], *scored.normalised_BK[index]]
            texts = [batch.prompts[index].strip(), batch.responses[index].strip()]
            rows.append([*texts, *(f"{figure:.2f}" for figure in figures)])
        return columns, rows

    @property
    def principles(self) -> tuple[str, ...]:
        """Column names of `ScoredBatch.raw_BK`."""
        return tuple(self._all_principles.principles)

    def by_principle(self, scored: ScoredBatch) -> dict[str, FloatArray]:
        """Raw scores [B] of each principle."""
        return {name: scored.raw_BK[:, index] for index, name in enumerate(self.principles)}

    def reference_rewards(self, reference: dict[str, list[Any]]) -> FloatArray:
        """The arm's reward on the SFT reference responses (columns of `scores_reference.parquet`)."""
        names = [self.columns[index] for index in self._reward_columns]
        rewards: FloatArray = self.reward(np.array([reference[name] for name in names]).T).reward_B
        return rewards


class PanelStream:
    """Scores rows while others are still sampled: `size` consecutive rows go to the panel once all of them are there.

    Which rows are scored together never depends on who finished first, so the scores do not either.
    """

    def __init__(
        self, submit: Callable[[Sequence[str]], PendingScores], num_rows: int, size: int
    ) -> None:
        self._submit = submit
        self._size = size
        self._texts: list[str | None] = [None] * num_rows
        self._groups: dict[int, PendingScores] = {}

    def take(self, first_row: int, part: Responses) -> None:
        """Finished rows, in any order."""
        for offset, text in enumerate(texts_of(part)):
            self._texts[first_row + offset] = text
        first_group = first_row // self._size
        for group in range(first_group, (first_row + len(part) - 1) // self._size + 1):
            rows = self._texts[group * self._size : (group + 1) * self._size]
            texts = [text for text in rows if text is not None]
            if len(texts) == len(rows) and group not in self._groups:
                self._groups[group] = self._submit(texts)

    def scores(self) -> FloatArray:
        """Raw scores [B, columns] of all rows, in order; waits for them."""
        groups = [self._groups[group].result() for group in sorted(self._groups)]
        return np.concatenate([table.scores_BK for table in groups])


def texts_of(batch: Responses) -> list[str]:
    """Prompt and response in one text, as preference models read them."""
    return [dialogue_text(p, r) for p, r in zip(batch.prompts, batch.responses, strict=True)]
