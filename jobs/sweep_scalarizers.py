"""Job `sweep_scalarizers`: stage `4_sweep` - Ray Tune over scalarizers, their parameters and the weights.

offline   cached PM scores -> accuracy per draw; one trial per scalarizer scores all its draws, since a trial is a
          process of seconds and a draw is a millisecond. Split `weights` selects, split `test` reports.
online    short PPO runs, one trial per scalarizer (`sweep.online_steps` > 0): `run_online_trials(context, run_one)`,
          where `run_one(context, arm, num_steps)` returns reward_gain, kl, oracle_gain, win_rate.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from actors.engines import engine_extra
from jobs.context import JobContext
from jobs.progress import Reporter, Task
from morlaif_ray.artifacts import read_json, write_csv, write_json
from morlaif_ray.config.learning import ALL_SCALARIZERS, ArmConfig, RewardConfig
from morlaif_ray.errors import MorlaifError, ResourceError
from morlaif_ray.reward import choose_best, evaluate_draws, make_draws
from morlaif_ray.reward.function import RewardFunction
from morlaif_ray.reward.pairs import PairScores, read_pair_scores, read_prompt_ids

STAGE = "4_sweep"
OFFLINE_TIMEOUT_S = 900.0
OFFLINE_COLUMNS = (
    "trial",
    "scalarizer",
    "parameter",
    "value",
    "weight_scale",
    "accuracy_weights",
    "accuracy",
)
ONLINE_FIGURES = ("reward_gain", "kl", "oracle_gain", "win_rate")

RunOne = Callable[[JobContext, ArmConfig, int], Mapping[str, float]]


def run(context: JobContext) -> None:
    """Publishes `4_sweep` unless it is up to date."""
    sweep = context.config.sweep
    online = sweep.online_steps > 0
    stage = context.stage(
        STAGE,
        sections=["reward", "sweep", *(["policy"] if online else [])],
        inputs=["3_preference_models", "4_reward", *(["0_sft"] if online else [])],
        extra=engine_extra(context.config) if online else None,
    )
    if stage.is_current():
        context.reporter.skipped(STAGE)
        return
    stage.resumable_work_dir()
    offline_rows, best = run_offline_trials(context)
    online_rows: list[dict[str, Any]] = []
    if online:
        from jobs.train_policy import run_arm_inline  # imports torch: only where PPO runs

        online_rows = run_online_trials(context, run_arm_inline)
    rows = {"sweep_offline": len(offline_rows), "sweep_online": len(online_rows)}
    with stage.writing(rows) as folder:
        write_csv(
            folder / "sweep_offline.csv",
            [{name: _blank(row[name]) for name in OFFLINE_COLUMNS} for row in offline_rows],
        )
        write_csv(folder / "sweep_online.csv", online_rows)
        write_json(folder / "best.json", best)
    shutil.rmtree(stage.work_dir, ignore_errors=True)


def run_offline_trials(context: JobContext) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Scores `sweep.num_offline_samples` draws per scalarizer on cached scores.

    Returns:
        rows: one per draw (`evaluate_draws`), in the order of the scalarizers whatever finished first.
        best: `choose_best`; without draws or labelled pairs its `best` is None.
    """
    reward, sweep = context.config.reward, context.config.sweep
    weights = read_json(context.path("4_reward", "weights.json"))
    base = RewardFunction.from_artifacts(weights, "linear", reward)
    select, test = _read_splits(context.run_dir)
    if not sweep.num_offline_samples or not len(select) or not len(test):
        context.reporter.line(f"{STAGE}: no draws or no labelled pairs, so no offline sweep")
        return [], choose_best([], base, reward, test, context.config.seed)
    from ray import tune

    context.connect()
    trainable = tune.with_parameters(
        offline_trial,
        base=base,
        config=reward,
        select=select,
        test=test,
        num_draws=sweep.num_offline_samples,
        spread=sweep.weight_spread,
        seed=context.config.seed,
    )
    with context.reporter.task("sweep", total=len(ALL_SCALARIZERS), unit="scalarizers") as task:
        found = run_trials(
            tune.with_resources(trainable, {"cpu": 1}),
            ALL_SCALARIZERS,
            storage=context.path("work", STAGE),
            name="offline",
            concurrent=sweep.concurrent_trials,
            timeout_s=OFFLINE_TIMEOUT_S,
            reuse_processes=True,
            task=task,
        )
    rows = [row for name in ALL_SCALARIZERS for row in found[name]["rows"]]
    return rows, choose_best(rows, base, reward, test, context.config.seed)


def run_online_trials(context: JobContext, run_one: RunOne) -> list[dict[str, Any]]:
    """Short PPO runs, one Tune trial per `sweep.online_scalarizers`; an interrupted sweep goes on where it was.

    Args:
        run_one: `run_one(context, arm, num_steps)`, importable by name in another process. It runs inside a trial that
            holds no CPU itself: the actors that it starts reserve theirs. Figures that it does not return stay empty.

    Returns:
        rows of `sweep_online.csv`.
    """
    from ray import tune

    sweep = context.config.sweep
    context.connect()
    # The reporter holds a terminal and cannot travel: a trial makes a quiet one of its own.
    trainable = tune.with_parameters(
        online_trial,
        config_json=context.config.model_dump_json(),
        run_dir=context.run_dir,
        run_one=run_one,
    )
    with context.reporter.task(
        "online sweep", total=len(sweep.online_scalarizers), unit="PPO runs"
    ) as task:
        found = run_trials(
            tune.with_resources(trainable, {"cpu": 0.01}),
            sweep.online_scalarizers,
            storage=context.path("work", STAGE),
            name="online",
            concurrent=sweep.concurrent_trials,
            timeout_s=None,  # a PPO run's own waits end by policy.call_timeout_s
            reuse_processes=False,  # each PPO run starts from a clean process
            task=task,
        )
    return [
        {
            "trial": trial,
            "scalarizer": name,
            "steps": sweep.online_steps,
            **{figure: _blank(found[name].get(figure)) for figure in ONLINE_FIGURES},
        }
        for trial, name in enumerate(sweep.online_scalarizers)
    ]


def offline_trial(
    setting: Mapping[str, str],
    *,
    base: RewardFunction,
    config: RewardConfig,
    select: PairScores,
    test: PairScores,
    num_draws: int,
    spread: float,
    seed: int,
) -> None:
    """Tune trainable: all draws of one scalarizer."""
    from ray import tune

    draws = make_draws(
        setting["scalarizer"], base, config, num_draws=num_draws, spread=spread, seed=seed
    )
    tune.report({"rows": evaluate_draws(draws, base, config, select, test)})


def online_trial(
    setting: Mapping[str, Any], *, config_json: str, run_dir: Path, run_one: RunOne
) -> None:
    """Tune trainable: one short PPO run."""
    from ray import tune

    from morlaif_ray.config import Config

    config = Config.model_validate_json(config_json)
    context = JobContext(config=config, run_dir=run_dir, reporter=Reporter(quiet=True))
    steps = config.sweep.online_steps
    arm = ArmConfig(
        name=f"sweep_{setting['scalarizer']}", scalarizer=setting["scalarizer"], num_steps=steps
    )
    tune.report({key: float(value) for key, value in run_one(context, arm, steps).items()})


def run_trials(
    trainable: Any,
    scalarizers: Sequence[str],
    *,
    storage: Path,
    name: str,
    concurrent: int,
    timeout_s: float | None,
    reuse_processes: bool,
    task: Task,
) -> dict[str, dict[str, Any]]:
    """One quiet Tune experiment with a trial per scalarizer; the last report of each.

    Args:
        timeout_s: for all trials together; None: no limit.
        reuse_processes: run one trial after the other in the same process, which saves a second or more each.

    Raises:
        MorlaifError: a trial failed (Tune itself only counts that); the same command tries the failed ones again.
        ResourceError: not every trial ended within `timeout_s`.
    """
    from ray import tune

    run_config = tune.RunConfig(
        name=name, storage_path=str(storage), verbose=0, callbacks=[_counting(task)]
    )
    folder = str(storage / name)
    with _quiet_tune():
        if tune.Tuner.can_restore(folder):
            tuner = tune.Tuner.restore(
                folder, trainable=trainable, resume_unfinished=True, restart_errored=True
            )
        else:
            tuner = tune.Tuner(
                trainable,
                param_space={"scalarizer": tune.grid_search(list(scalarizers))},
                tune_config=tune.TuneConfig(
                    max_concurrent_trials=concurrent,
                    time_budget_s=timeout_s,
                    reuse_actors=reuse_processes,
                ),
                run_config=run_config,
            )
        results = tuner.fit()
    found = _last_reports(results, folder)
    waiting = [item for item in scalarizers if item not in found]
    if waiting:
        shutil.rmtree(folder, ignore_errors=True)  # Tune would count the spent time again
        raise ResourceError(
            f"{STAGE}: {len(waiting)} of {len(scalarizers)} sweep trials ({', '.join(waiting)}) did not "
            f"end within {timeout_s} s; likely no CPU was free - stop other jobs or raise cluster.num_cpus"
        )
    return found


def _last_reports(results: Any, folder: str) -> dict[str, dict[str, Any]]:
    """Scalarizer -> last report of its trial; MorlaifError where a trial failed."""
    if results.num_errors:
        cause = str(results.errors[0]).strip().splitlines()[-1]
        raise MorlaifError(
            f"{STAGE}: {results.num_errors} of {len(results)} sweep trials failed, the first with "
            f"'{cause}'; run the same command again to repeat them (traces in {folder})"
        )
    ended = [results[index] for index in range(len(results))]
    return {
        item.config["scalarizer"]: dict(item.metrics)
        for item in ended
        if item.config and item.metrics
    }


def _counting(task: Task) -> Any:
    """A Tune callback that advances the bar per finished trial."""
    from ray.tune import Callback

    class Counting(Callback):
        task: Task | None

        def __getstate__(self) -> dict[str, None]:
            return {
                "task": None
            }  # Tune pickles its callbacks into the experiment: the bar stays behind

        def on_trial_complete(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            if self.task is not None:
                self.task.advance(1)

    callback = Counting()
    callback.task = task
    return callback


@contextmanager
def _quiet_tune() -> Iterator[None]:
    """Tune without its tables, result files per trial and advice; what fails is raised by `run_trials`."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault(
        "RAY_AIR_NEW_OUTPUT", "0"
    )  # the new output prints a table even at verbose=0
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.train", "ray.air")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _read_splits(run_dir: Path) -> tuple[PairScores, PairScores]:
    """Complete pairs of splits `weights` (selects) and `test` (reports)."""
    models = run_dir / "3_preference_models"
    panel = read_json(models / "panel.json")
    prompts = read_prompt_ids(run_dir)
    weights, test = (
        read_pair_scores(
            models / f"scores_{split}.parquet", panel["principles"], panel["baselines"], prompts
        ).complete()
        for split in ("weights", "test")
    )
    return weights, test


def _blank(value: Any) -> Any:
    """Missing figures are empty in a CSV file."""
    return "" if value is None or value != value else value
