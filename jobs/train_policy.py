"""Stage 5: PPO for every arm. One arm is one policy: a scalarizer over the preference models, or a baseline's model.

    prompts -> rollout workers -> panel -> reward -> learner -> weights back to the rollout workers

`run_arm` is that loop; with `policy.staleness: 1` the next step's responses are sampled beside the update.
Everything random in it is a function of (seed, step, index), and the learner's checkpoint (with the batch in flight)
holds the rest, so a run that stops, or loses a learner, ends with the same bits as one that does not.
"""

from __future__ import annotations

import shutil
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress

from actors.engines import check_engine, engine_extra
from actors.supervision import InputLostError
from jobs.arm import Arm, ArmStopped, LearnerWentBack
from jobs.checks import check_policy_prompts, remote_address
from jobs.context import JobContext
from jobs.progress import Task
from jobs.rollouts_ahead import Batch
from jobs.tracking import PrometheusGauges, open_tracker
from morlaif_ray.config.learning import ArmConfig
from morlaif_ray.errors import ActorLostError, ConfigError

STAGE = "5_policy"
STOP_TIMEOUT_S = 120.0


def run(context: JobContext) -> None:
    stage = context.stage(
        STAGE,
        sections=["policy", "reward"],
        inputs=["0_sft", "1_pairs", "3_preference_models", "4_reward"],
        extra=engine_extra(context.config),
    )
    if stage.is_current():
        context.reporter.skipped(STAGE)
        return
    check_supported(context)
    check_policy_prompts(context)
    work = stage.resumable_work_dir()
    context.connect()
    from actors.preference_panel import PreferencePanel, panel_columns

    arms = context.config.policy.arms
    baselines = list(dict.fromkeys(arm.baseline for arm in arms if arm.baseline is not None))
    columns = panel_columns(context.path("3_preference_models"), baselines)
    panel = PreferencePanel(context.config, columns, context.reporter.line)
    gauges = PrometheusGauges()
    total = sum(arm.num_steps or context.config.policy.num_steps for arm in arms)
    with context.reporter.task("PPO", total=total, unit="steps") as task:

        def train(arm: ArmConfig, stop: threading.Event) -> None:
            if (
                work / arm.name / "summary.json"
            ).is_file():  # written last: this arm had ended before a stop
                task.advance(arm.num_steps or context.config.policy.num_steps)
                return
            run_arm(Arm(context, arm, work / arm.name, panel), task, gauges, stop)

        _run_concurrently(arms, train, context.config.policy.concurrent_arms)
    panel.close()
    with stage.writing({"arms": len(arms)}) as folder:
        for arm in arms:
            target = folder / arm.name
            target.mkdir()
            shutil.copytree(work / arm.name / "model", target / "model")
            for name in ("metrics.parquet", "summary.json"):
                shutil.copy2(work / arm.name / name, target / name)
    shutil.rmtree(work)


def check_supported(context: JobContext) -> None:
    """What this version cannot do ends here, before a model loads."""
    policy = context.config.policy
    check_engine(context.config, here=remote_address(context.config) is None)
    if policy.learner_gpus_per_rank > 1:
        raise ConfigError(
            f"policy.learner_gpus_per_rank is {policy.learner_gpus_per_rank:g}, and a rank uses one GPU; write 1, and "
            f"policy.learner_ranks for more"
        )
    model = context.config.model
    if policy.lora is None and model.kind != "scratch" and model.dtype == "bfloat16":
        # AdamW adds to the weights where they are: a step below 1/256 of a weight is rounded away.
        raise ConfigError(
            "policy: bfloat16 weights are too coarse for AdamW; write model.dtype: float32 with policy.bf16_autocast: "
            "true, or policy.lora"
        )


def run_arm(arm: Arm, task: Task, gauges: PrometheusGauges, stop: threading.Event) -> None:
    """Trains one policy, from its checkpoint where there is one, and leaves model, metrics and summary."""
    tracker = open_tracker(arm.context.config, arm.context.run_dir, f"5_policy/{arm.config.name}")
    policy = arm.context.config.policy
    step = arm.start()
    task.advance(step)
    measured = time.monotonic()
    while True:
        try:
            if stop.is_set():
                arm.checkpoint()
                raise ArmStopped(arm.config.name)
            if step >= arm.num_steps:
                arm.finish()
                break
            batch, scored = _next_batch(arm, step)
            metrics = arm.update(step, batch, scored)
            arm.await_rollouts(step - batch.policy_version)
            arm.refresh(step + 1)
            # From here to here, so that log, tracker and checkpoint count as well: in the step that follows them.
            now = time.monotonic()
            arm.measure(now - measured)
            measured = now
            arm.record(step + 1, metrics)
            step += 1
            shown = {**metrics, **arm.seconds, **arm.gauges}
            tracker.log(step, shown)
            if policy.samples_every and step % policy.samples_every == 0:
                tracker.log_table(step, "samples", *arm.scorer.sample_table(batch, scored))
            del batch, scored  # with them go the last references to the step's arrays
            gauges.log(arm.config.name, shown)
            task.note(
                f"{arm.config.name}: reward {metrics['reward_mean']:+.2f}, KL {metrics['kl_mean']:.1f}"
            )
            task.advance(1)
            if step % policy.checkpoint_every == 0 and step < arm.num_steps:
                arm.checkpoint()
        except (LearnerWentBack, InputLostError) as error:
            if isinstance(error, InputLostError):  # new weights, or what is in flight
                arm.go_back(error.message)
            task.advance(arm.step - step)
            step = arm.step
    tracker.close()


def _next_batch(arm: Arm, step: int) -> Batch:
    """The parity check and the batch of this step. Where an actor is lost for good, the steps so far are kept."""
    parity_every = arm.context.config.policy.parity_every
    try:
        if parity_every and step % parity_every == 0:
            arm.check_parity(step)
        return arm.ahead.take(step)
    except InputLostError:
        raise
    except ActorLostError:
        with suppress(Exception):  # what was lost is the cause to show
            arm.checkpoint()
        raise


def _run_concurrently(arms: list[ArmConfig], train, num_concurrent: int) -> None:  # type: ignore[no-untyped-def]
    """Arms as threads (they mostly wait for actors). The first failure, or Ctrl-C, makes all of them checkpoint."""
    stop = threading.Event()
    with ThreadPoolExecutor(max_workers=num_concurrent) as pool:
        futures: list[Future[None]] = [pool.submit(train, arm, stop) for arm in arms]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        except KeyboardInterrupt:
            stop.set()
            for future in futures:
                future.cancel()
            wait(futures, timeout=STOP_TIMEOUT_S)
            raise
        failed = [future for future in futures if future.done() and future.exception() is not None]
        if failed:
            stop.set()
            for future in futures:
                future.cancel()
            wait(futures, timeout=STOP_TIMEOUT_S)
        for future in failed:
            future.result()


def run_arm_inline(context: JobContext, arm: ArmConfig, num_steps: int) -> dict[str, float]:
    """A short run of one arm with a panel of its own, for the online sweep; returns the sweep's figures.

    `oracle_gain` is the change of the true utility since the first step; absent on real data.
    """
    from actors.preference_panel import PreferencePanel, panel_columns
    from morlaif_ray.artifacts import read_json, read_table

    check_supported(context)
    context.connect()
    baselines = [arm.baseline] if arm.baseline is not None else []
    columns = panel_columns(context.path("3_preference_models"), baselines)
    panel = PreferencePanel(context.config, columns, context.reporter.line)
    work = context.path("work", "4_sweep", "arms", arm.name)
    short = arm.model_copy(update={"num_steps": num_steps})
    with context.reporter.task(arm.name, total=num_steps, unit="steps") as task:
        run_arm(Arm(context, short, work, panel), task, PrometheusGauges(), threading.Event())
    panel.close()
    summary = read_json(work / "summary.json")
    figures = {"reward_gain": float(summary["reward_gain_sd"]), "kl": float(summary["final_kl"])}
    utility = read_table(work / "metrics.parquet").get("oracle_utility")
    if utility:
        figures["oracle_gain"] = float(sum(utility[-5:]) / len(utility[-5:]) - utility[0])
    return figures
