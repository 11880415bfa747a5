"""One policy in training: its actors, prompts, reward, and record on disk. `train_policy.run_arm` is the loop."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from actors.ppo_learner import spawn_ppo_learner
from actors.preference_panel import PreferencePanel
from actors.rollout_pool import RolloutPool, join_batches
from actors.stored_rollouts import StoredRollouts
from actors.supervision import (
    InputLostError,
    KilledAtStartError,
    cause_of,
    input_is_lost,
    lost_errors,
    one_line,
    was_killed,
)
from jobs.arm_parity import gap_between
from jobs.arm_record import ArmRecord
from jobs.arm_scoring import ArmScorer, PanelStream, Responses, ScoredBatch
from jobs.context import JobContext
from jobs.prompt_schedule import PromptSchedule
from jobs.rollouts_ahead import Batch, RolloutsAhead, score_arrays
from jobs.train_sft import sft_model_path
from morlaif_ray.artifacts import read_table
from morlaif_ray.config.learning import ArmConfig
from morlaif_ray.errors import ActorLostError, MorlaifError
from morlaif_ray.rl.generation import SamplingSettings
from morlaif_ray.seeding import derive_seed
from morlaif_ray.types import RolloutBatch

PARITY_PROMPTS = 4


class ArmStopped(Exception):
    """The arm was asked to stop and has checkpointed."""


class LearnerWentBack(Exception):
    """The learner was lost; it and the rollout workers are back at the last checkpoint: go on from `arm.step`."""


class _NotStartedError(Exception):
    """The learner did not come up; the message is the cause."""

    def __init__(self, cause: str, *, killed: bool = False) -> None:
        super().__init__(cause)
        self.killed = killed


def _started(learner: Any, timeout_s: float) -> tuple[int, list[str], dict[str, Any]]:
    """Waits for a learner; its step count, notes and what the loop had saved with that step. _NotStartedError where
    it does not come up."""
    import ray

    try:
        step = ray.get(learner.ping.remote(), timeout=timeout_s)
        notes = ray.get(learner.notes.remote(), timeout=timeout_s)
        return step, notes, ray.get(learner.loop_state.remote(), timeout=timeout_s)
    except ray.exceptions.GetTimeoutError:
        raise _NotStartedError(
            f"did not start in {timeout_s:.0f} s; the cluster may lack free CPUs or GPUs ('morlaif plan'), or raise "
            f"cluster.start_timeout_s"
        ) from None
    except ray.exceptions.RayTaskError as error:
        cause = cause_of(error)
        if isinstance(cause, MorlaifError) and not isinstance(cause, ActorLostError):
            raise cause from None  # it would be the same again
        said = cause.message if isinstance(cause, ActorLostError) else one_line(error.cause)
        killed = isinstance(cause, KilledAtStartError)
        raise _NotStartedError(f"did not start: {said}", killed=killed) from None
    except lost_errors() as error:
        killed = was_killed(error)
        raise _NotStartedError(f"did not start: {one_line(error)}", killed=killed) from None


def _beyond_budget(arm: str, deaths: int, cause: str, budget: int) -> ActorLostError:
    return ActorLostError(
        f"arm '{arm}': the learner died {deaths} times (last: {cause}); policy.max_restarts is {budget}; the same "
        f"command resumes from the last checkpoint"
    )


def _outcome(summary: dict[str, Any]) -> str:
    return (
        f"reward {summary['reward_gain_sd']:+.2f} SFT standard deviations at KL {summary['final_kl']:.1f} after "
        f"{summary['num_steps']} steps"
    )


def _learner_of(context: JobContext, work: Path, num_steps: int) -> Any:
    config = context.config
    return spawn_ppo_learner(
        sft_model_path(context),
        config.policy,
        seed=derive_seed(config.seed, "learner"),
        dtype="float32" if config.model.kind == "scratch" else config.model.dtype,
        checkpoint_dir=work / "checkpoint",
        num_steps=num_steps,
    )


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
        """Wall seconds of the phases of the last step; with `policy.staleness: 1` phases overlap."""
        self.gauges: dict[str, float] = {}
        """How the loop ran, beside the seconds; like them no part of the results."""
        work.mkdir(parents=True, exist_ok=True)
        self._record = ArmRecord(context, config, work, self.num_steps)
        self._restarts = 0
        self.scorer = ArmScorer(context, config, panel)
        self._stream: PanelStream | None = None
        self._unloaded: tuple[list[Any], int, float] | None = None
        """What the rollout workers load before they sample again: weights, version, seconds until they were here."""
        policy = context.config.policy
        self._sampling = SamplingSettings(
            policy.max_new_tokens, policy.temperature, tuple(policy.stop)
        )
        self.ahead = RolloutsAhead(
            self._sample_and_score,
            policy.staleness,
            work / "in_flight",
            policy.keep_checkpoints + 2,
            write=lambda path, batch: self._ask(
                "write_rollouts", path, batch[0], score_arrays(batch[1])
            ),
        )

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
        try:
            self._adopt_learner()
        except _NotStartedError as error:
            if not error.killed:
                raise ActorLostError(f"arm '{self.config.name}': the learner {error}") from None
            self.go_back(str(error))
        if self.step:
            self._hand_out_weights()
        return self.step

    def generate(self, step: int) -> StoredRollouts:
        """The responses of this step; with `policy.rollout_chunk` finished ones go to the panel at once."""
        self._load_new_weights()
        started = time.monotonic()
        policy = self.context.config.policy
        prompts = self._schedule.prompts_of(step)
        if policy.rollout_chunk:
            self._stream = PanelStream(self.scorer.submit, len(prompts), policy.rollout_chunk)
        batch = self._rollouts.generate_stored(
            self._schedule.requests(prompts, "policy", step),
            self._sampling,
            self._stream.take if self._stream else None,
        )
        seconds = self.seconds["seconds_generate"] = max(time.monotonic() - started, 1e-9)
        self.gauges["generated_tokens_per_second"] = float(batch.response_lengths_B.sum()) / seconds
        return batch

    def score(self, batch: Responses) -> ScoredBatch:
        """Panel scores and the arm's scalar reward; stops the run when too many scores are missing."""
        started = time.monotonic()
        stream, self._stream = self._stream, None
        scored = self.scorer.score(batch, stream.scores() if stream else None)
        self.seconds["seconds_score"] = time.monotonic() - started
        return scored

    def _sample_and_score(self, step: int) -> Batch:
        batch = self.generate(step)
        return batch, self.score(batch)

    def check_parity(self, step: int) -> None:
        """Holds every engine's log-probabilities against the learner's, on the same tokens and the same weights."""
        self._load_new_weights()
        policy = self.context.config.policy
        prompts = self._schedule.prompts_of(step)[:: policy.samples_per_prompt][:PARITY_PROMPTS]
        probes = self._rollouts.generate_on_each(
            self._schedule.requests(prompts, "parity", step), self._sampling
        )
        probe = join_batches(probes)
        expected_BT = self._ask("logprobs", probe)
        gap = gap_between(probe, expected_BT)
        self.gauges |= {"parity_gap_max": gap.worst, "parity_gap_mean": gap.mean}
        alarm = gap.alarm(policy.parity_threshold)
        if alarm is not None:
            self.gauges["parity_alarms"] = self.gauges.get("parity_alarms", 0.0) + 1
            self.context.reporter.line(f"  arm {self.config.name}: step {step}: {alarm}")

    def update(
        self, step: int, batch: RolloutBatch | StoredRollouts, scored: ScoredBatch
    ) -> dict[str, float]:
        """One PPO step; sampling for the next one begins beside it. LearnerWentBack (here and below) where the learner
        was lost and restored."""
        started = time.monotonic()
        arguments = (batch, scored.reward_B, self.scorer.by_principle(scored))
        pending = self._learner.update.remote(
            *arguments
        )  # first of all: nothing else is waited for
        if step + 1 < self.num_steps:
            self.ahead.begin(step + 1)
        observed = self.scorer.observations(batch, scored)  # while the learner works
        metrics: dict[str, float] = self._answer("update", pending)
        self.seconds["seconds_update"] = time.monotonic() - started
        return {**metrics, **observed}

    def await_rollouts(self, staleness: int) -> None:
        """Until no response is being sampled any more; only then may the workers' weights change."""
        self.gauges["rollouts_ready"] = float(self.ahead.wait())
        self.gauges["staleness"] = float(staleness)
        self.seconds["seconds_wait_rollouts"] = self.ahead.wait_s

    def measure(self, seconds: float) -> None:
        """The learner's idle share of a step that took so many wall seconds."""
        self.seconds["seconds_step"] = seconds
        self.gauges["learner_idle_share"] = max(0.0, 1.0 - self.seconds["seconds_update"] / seconds)

    def refresh(self, step: int) -> None:
        """Takes the new weights from the learner: references, they never pass the driver. The rollout workers load
        them before they sample again: one step off that is beside the next update. A direct transfer is done here."""
        started = time.monotonic()
        if self._rollouts.sends_directly:
            failure = self._rollouts.send_weights(self._learner, step, self._answer)
            self.step = step
            self.seconds["seconds_refresh"] = time.monotonic() - started
            if failure is None:
                return
            self.context.reporter.line(
                f"  arm {self.config.name}: step {step}: weights go through the object store ({failure})"
            )
        self._unloaded = (self._new_weights(), step, time.monotonic() - started)
        self.step = step

    def _load_new_weights(self) -> None:
        if self._unloaded is None:
            return
        started = time.monotonic()
        (weights, step, seconds), self._unloaded = self._unloaded, None
        self._rollouts.load_weights(weights, step)
        self.seconds["seconds_refresh"] = seconds + time.monotonic() - started

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Adds a row to the arm's log."""
        self._record.add(step, metrics, {**self.seconds, **self.gauges})

    def checkpoint(self) -> None:
        self.ahead.save(self.step)
        # The scores of a batch in flight are counted, and a resumed run reads that batch from disk.
        self._ask("save_checkpoint", {"scores": self.scorer.state()})

    def finish(self) -> None:
        """Saves the policy and the tables, and ends the arm's own actors."""
        import ray

        self._ask("save_model", str(self.work / "model"))
        reference = read_table(self.context.path("3_preference_models", "scores_reference.parquet"))
        summary = self._record.publish(self.scorer.reference_rewards(reference))
        ray.kill(self._learner)
        self._rollouts.close()
        self.context.reporter.line(f"  arm {self.config.name}: {_outcome(summary)}")

    # ------------------------------------------------------------ inside

    def _spawn_learner(self) -> Any:
        return _learner_of(self.context, self.work, self.num_steps)

    def _ask(self, method: str, *arguments: Any) -> Any:
        """A call of the learner; LearnerWentBack where it was lost and restored."""
        return self._answer(method, getattr(self._learner, method).remote(*arguments))

    def _answer(self, method: str, pending: Any) -> Any:
        import ray

        timeout_s = self.context.config.policy.call_timeout_s
        try:
            return ray.get(pending, timeout=timeout_s)
        except ray.exceptions.RayTaskError as error:
            if not input_is_lost(error):
                raise cause_of(error) from None
            self.go_back(f"what {method} needs was lost with the node that held it")
        except ray.exceptions.GetTimeoutError:
            self.go_back(f"no answer to {method} in {timeout_s:.0f} s")
        except lost_errors() as error:
            self.go_back(one_line(error))
        raise LearnerWentBack

    def _new_weights(self) -> list[Any]:
        """References to buckets of the policy's weights. Calls are answered in order: once `ping` is, they exist."""
        streaming = self._learner.weight_buckets.options(num_returns="streaming")
        buckets = streaming.remote(self.context.config.policy.weight_bucket_mb << 20)
        self._ask("ping")
        return list(buckets)

    def _adopt_learner(self) -> None:
        """Waits for the learner, takes its step count, and brings log and counters to the same step."""
        timeout_s = self.context.config.cluster.start_timeout_s
        self.step, notes, state = _started(self._learner, timeout_s)
        for note in notes:
            self.context.reporter.line(f"  arm {self.config.name}: {note}")
        self._record.go_back(self.step)
        self.scorer.restore(state.get("scores", {}))

    def go_back(self, cause: str) -> None:
        """A fresh learner at the last checkpoint, and its weights in the rollout workers; within the budget."""
        import ray

        budget = self.context.config.policy.max_restarts
        while True:
            ray.kill(self._learner)
            if self._restarts >= budget:
                raise _beyond_budget(self.config.name, self._restarts + 1, cause, budget)
            self._restarts += 1
            self.ahead.drop()
            self._unloaded = None
            self.context.reporter.line(
                f"  arm {self.config.name}: learner lost ({cause}); going back to its last checkpoint"
            )
            self._learner = self._spawn_learner()
            try:
                self._adopt_learner()
                break
            except _NotStartedError as error:
                cause = str(error)
        self._hand_out_weights()

    def _hand_out_weights(self) -> None:
        """The learner's weights to all rollout workers, also where they are lost on the way."""
        try:
            with suppress(LearnerWentBack):  # the call that raised it has restored everything
                self._rollouts.load_weights(self._new_weights(), self.step)
        except InputLostError as error:
            self.go_back(error.message)
