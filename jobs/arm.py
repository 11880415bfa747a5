"""One policy in training: its actors, prompts, reward, and record on disk. `train_policy.run_arm` is the loop."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actors.ppo_learner import spawn_ppo_learner
from actors.preference_panel import PreferencePanel
from actors.rollout_pool import RolloutPool
from actors.supervision import cause_of, one_line
from jobs.context import JobContext
from jobs.prompt_schedule import PromptSchedule
from jobs.train_sft import sft_model_path
from morlaif_ray.artifacts import read_table, write_json, write_table
from morlaif_ray.backbone.dialogue import dialogue_text
from morlaif_ray.config.learning import ArmConfig
from morlaif_ray.errors import ActorLostError, ScalarizerError
from morlaif_ray.reward.function import RewardFunction
from morlaif_ray.rl.generation import SamplingSettings
from morlaif_ray.seeding import derive_seed
from morlaif_ray.types import FloatArray, GenerationRequest, RolloutBatch

METRICS_LOG = "metrics.jsonl"


class ArmStopped(Exception):
    """The arm was asked to stop and has checkpointed."""


class LearnerWentBack(Exception):
    """The learner was lost; it and the rollout workers are back at the last checkpoint: go on from `arm.step`."""


@dataclass(frozen=True)
class ScoredBatch:
    """Rewards of a rollout batch with the vector that they came from."""

    reward_B: FloatArray
    raw_BK: FloatArray
    normalised_BK: FloatArray
    seconds: float


class Arm:
    """Owns a learner and a rollout pool; shares the panel. Used by one thread."""

    def __init__(
        self, context: JobContext, config: ArmConfig, work: Path, panel: PreferencePanel
    ) -> None:
        self.context = context
        self.config = config
        self.work = work
        self.panel = panel
        self.step = 0
        self._schedule = PromptSchedule(context)
        self.num_steps = config.num_steps or context.config.policy.num_steps
        self.seconds: dict[str, float] = {}
        """Wall seconds of the phases of the last step."""
        self._rows: list[dict[str, float]] = []
        self._restarts = 0
        self._missing = self._scores = 0
        self._started = time.monotonic()
        work.mkdir(parents=True, exist_ok=True)
        weights_json = context.path("4_reward", "weights.json")
        settings = context.config.reward
        self._all_principles = RewardFunction.from_artifacts(weights_json, "linear", settings)
        if config.scalarizer is not None:
            self.reward = RewardFunction.from_artifacts(weights_json, config.scalarizer, settings)
        else:
            panel_json = context.path("3_preference_models", "panel.json")
            self.reward = RewardFunction.for_baseline(panel_json, str(config.baseline))
        names = [column.name for column in panel.columns]
        wanted = self.reward.principles if config.scalarizer else (f"baseline_{config.baseline}",)
        self._reward_columns = [names.index(name) for name in wanted]
        self._principle_columns = [names.index(name) for name in self._all_principles.principles]

    # ------------------------------------------------------------ the loop's verbs

    def start(self) -> int:
        """Starts the actors from the last checkpoint; returns the number of steps already done."""
        config = self.context.config
        self._learner = self._spawn_learner()
        self._rollouts = RolloutPool(
            config,
            sft_model_path(self.context),
            config.policy.num_rollout_workers,
            self.context.reporter.line,
        )
        self._adopt_learner()
        if self.step:
            with suppress(LearnerWentBack):
                self._rollouts.load_weights(self._new_weights(), self.step)
        return self.step

    def generate(self, step: int) -> RolloutBatch:
        """One response to each prompt of this step."""
        started = time.monotonic()
        policy = self.context.config.policy
        requests = [
            GenerationRequest(prompt, derive_seed(self.context.config.seed, "policy", step, index))
            for index, prompt in enumerate(self._schedule.prompts_of(step))
        ]
        settings = SamplingSettings(policy.max_new_tokens, policy.temperature, tuple(policy.stop))
        batch = self._rollouts.generate(requests, settings)
        self.seconds["seconds_generate"] = time.monotonic() - started
        return batch

    def score(self, batch: RolloutBatch) -> ScoredBatch:
        """Panel scores and the arm's scalar reward; stops the run when too many scores are missing."""
        started = time.monotonic()
        texts = [dialogue_text(p, r) for p, r in zip(batch.prompts, batch.responses, strict=True)]
        raw = self.panel.score(texts).scores_BK
        result = self.reward(raw[:, self._reward_columns])
        self._missing += result.num_missing
        self._scores += result.num_scores
        limit = self.context.config.reward.max_missing_share
        if self._missing > limit * self._scores:
            raise ScalarizerError(
                f"arm '{self.config.name}': {self._missing} of {self._scores} scores are missing, more than "
                f"reward.max_missing_share ({limit:g}) allows"
            )
        reward_B = (
            result.reward_B - self.context.config.policy.truncation_penalty * batch.truncated_B
        )
        principles = raw[:, self._principle_columns]
        self.seconds["seconds_score"] = time.monotonic() - started
        return ScoredBatch(
            reward_B,
            principles,
            self._all_principles.normaliser.apply(principles),
            time.monotonic() - started,
        )

    def update(self, step: int, batch: RolloutBatch, scored: ScoredBatch) -> dict[str, float]:
        """One PPO step. LearnerWentBack (here and below) where the learner was lost and restored."""
        started = time.monotonic()
        metrics: dict[str, float] = self._ask("update", batch, scored.reward_B)
        self.seconds["seconds_update"] = time.monotonic() - started
        return {**metrics, **self._observations(batch, scored)}

    def refresh(self, step: int) -> None:
        """Gives the new weights to the rollout workers; they travel through the object store, not the driver."""
        started = time.monotonic()
        self._rollouts.load_weights(self._new_weights(), step)
        self.step = step
        self.seconds["seconds_refresh"] = time.monotonic() - started

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Adds a row to the arm's log, which survives a kill. Seconds go elsewhere: they differ from run to run."""
        row = {"step": float(step), **metrics}
        seconds = self.context.path("timings", f"policy-{self.config.name}.jsonl")
        seconds.parent.mkdir(exist_ok=True)
        with seconds.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, **self.seconds}) + "\n")
        self._rows.append(row)
        with (self.work / METRICS_LOG).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")

    def checkpoint(self) -> None:
        self._ask("save_checkpoint")

    def finish(self) -> None:
        """Saves the policy and the tables, and ends the arm's own actors."""
        import ray

        self._ask("save_model", str(self.work / "model"))
        columns = {name: [row[name] for row in self._rows] for name in self._rows[0]}
        columns["step"] = [int(step) for step in columns["step"]]
        write_table(self.work / "metrics.parquet", columns)
        summary = self._summary()
        write_json(self.work / "summary.json", summary)
        ray.kill(self._learner)
        self._rollouts.close()
        self.context.reporter.line(
            f"  arm {self.config.name}: reward {summary['reward_gain_sd']:+.2f} SFT standard deviations at KL "
            f"{summary['final_kl']:.1f} after {self.num_steps} steps"
        )

    # ------------------------------------------------------------ inside

    def _spawn_learner(self) -> Any:
        config = self.context.config
        return spawn_ppo_learner(
            sft_model_path(self.context),
            config.policy,
            seed=derive_seed(config.seed, "learner"),
            dtype="float32" if config.model.kind == "scratch" else config.model.dtype,
            checkpoint_dir=self.work / "checkpoint",
            num_steps=self.num_steps,
        )

    def _ask(self, method: str, *arguments: Any) -> Any:
        """A call of the learner; LearnerWentBack where it was lost and restored."""
        import ray

        timeout_s = self.context.config.policy.call_timeout_s
        try:
            return ray.get(getattr(self._learner, method).remote(*arguments), timeout=timeout_s)
        except ray.exceptions.RayTaskError as error:
            raise cause_of(error) from None
        except ray.exceptions.GetTimeoutError:
            self._restore_learner(f"no answer to {method} in {timeout_s:.0f} s")
        except ray.exceptions.RayActorError as error:
            self._restore_learner(one_line(error))
        raise LearnerWentBack

    def _new_weights(self) -> Any:
        """A reference to the policy's weights. Calls are answered in order: once `ping` is, the weights exist."""
        weights = self._learner.weights.remote()
        self._ask("ping")
        return weights

    def _adopt_learner(self) -> None:
        """Waits for the learner, takes its step count, and brings the log to the same step."""
        import ray

        timeout_s = self.context.config.cluster.start_timeout_s
        try:
            self.step = ray.get(self._learner.ping.remote(), timeout=timeout_s)
        except ray.exceptions.GetTimeoutError:
            raise ActorLostError(
                f"arm '{self.config.name}': the learner did not start in {timeout_s:.0f} s; the cluster may lack "
                f"free CPUs or GPUs ('morlaif plan'), or raise cluster.start_timeout_s"
            ) from None
        except ray.exceptions.RayTaskError as error:
            raise cause_of(error) from None
        except ray.exceptions.RayActorError as error:
            raise ActorLostError(
                f"arm '{self.config.name}': the learner did not start: {one_line(error)}"
            ) from None
        self._rows = [row for row in _read_log(self.work / METRICS_LOG) if row["step"] <= self.step]
        text = "".join(json.dumps(row) + "\n" for row in self._rows)
        (self.work / METRICS_LOG).write_text(text, encoding="utf-8")

    def _restore_learner(self, cause: str) -> None:
        """A fresh learner at the last checkpoint, and its weights in the rollout workers; within the budget."""
        import ray

        budget = self.context.config.policy.max_restarts
        ray.kill(self._learner)
        if self._restarts >= budget:
            raise ActorLostError(
                f"arm '{self.config.name}': the learner died {self._restarts + 1} times (last: {cause}); "
                f"policy.max_restarts is {budget}; the same command resumes from the last checkpoint"
            )
        self._restarts += 1
        self.context.reporter.line(
            f"  arm {self.config.name}: learner lost ({cause}); going back to its last checkpoint"
        )
        self._learner = self._spawn_learner()
        self._adopt_learner()
        with suppress(LearnerWentBack):  # lost once more: the inner call has restored everything
            self._rollouts.load_weights(self._new_weights(), self.step)

    def _observations(self, batch: RolloutBatch, scored: ScoredBatch) -> dict[str, float]:
        """What is logged beside the update: scores per principle, and on the test-bed the truth."""
        values = {"reward_std": float(scored.reward_B.std())}
        for index, name in enumerate(self._all_principles.principles):
            values[f"raw_{name}"] = float(np.nanmean(scored.raw_BK[:, index]))
            values[f"norm_{name}"] = float(np.nanmean(scored.normalised_BK[:, index]))
        if self.context.config.on_testbed:
            from morlaif_ray.testbed import human_utility, read_response

            texts = list(zip(batch.prompts, batch.responses, strict=True))
            values["oracle_utility"] = float(np.mean([human_utility(*text) for text in texts]))
            values["well_formed_share"] = float(
                np.mean([read_response(*t).well_formed for t in texts])
            )
        return values

    def _summary(self) -> dict[str, Any]:
        reference = read_table(self.context.path("3_preference_models", "scores_reference.parquet"))
        names = [self.panel.columns[index].name for index in self._reward_columns]
        sft_reward = self.reward(np.array([reference[name] for name in names]).T).reward_B
        last = self._rows[-max(5, len(self._rows) // 10) :]
        final = float(np.mean([row["reward_mean"] for row in last]))
        mean, std = float(sft_reward.mean()), float(sft_reward.std(ddof=1))
        return {
            "arm": self.config.name,
            "scalarizer": self.config.scalarizer,
            "baseline": self.config.baseline,
            "num_steps": self.num_steps,
            "num_samples": self.num_steps * self.context.config.policy.batch_size,
            "sft_reward_mean": mean,
            "sft_reward_std": std,
            "final_reward_mean": final,
            "reward_gain_sd": (final - mean) / std,
            "final_kl": float(np.mean([row["kl_mean"] for row in last])),
        }


def _read_log(path: Path) -> list[dict[str, float]]:
    """Rows of the log; a half-written last line is dropped, its step will be run again."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
