"""Preference models as Ray Tune trials of a Ray Train trainer: K principles (or one trunk) and the baselines.

Tune is the scheduler: it runs `concurrent_trials` at a time, retries a lost one, and every training resumes from its
own checkpoint in the work folder, so neither a dead worker nor a dead driver loses more than a few steps.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actors.training import ProgressFile, cluster_has_gpu, find_cause, following, set_single_thread
from morlaif_ray.artifacts import read_json, read_table, write_csv, write_json
from morlaif_ray.config import Config
from morlaif_ray.errors import ActorLostError, MorlaifError
from morlaif_ray.seeding import derive_seed


def preference_loop(settings: Mapping[str, Any]) -> None:
    """Trains one preference model; leaves `models/<name>/` and `losses/<name>.csv` in the work folder.

    An error of the training itself (a loss that is not finite, memory too small for one pair) would come again in
    every restart: it is left in `failures/<name>.json` and raised again at once instead.
    """
    marker = Path(settings["work_dir"]) / "failures" / f"{settings['name']}.json"
    if marker.is_file():
        raise _read_failure(marker)
    try:
        _train_one(settings)
    except MorlaifError as error:
        from morlaif_ray.preference.sharding import current_ranks

        if current_ranks().rank == 0:
            write_json(marker, {"error": type(error).__name__, "message": error.message})
        raise


def _read_failure(marker: Path) -> MorlaifError:
    record = read_json(marker)
    kinds = {kind.__name__: kind for kind in MorlaifError.__subclasses__()}
    return kinds[record["error"]](record["message"])


def _train_one(settings: Mapping[str, Any]) -> None:
    from morlaif_ray.preference.sharding import current_ranks, whole_weights
    from morlaif_ray.preference.training import train_preference_model

    set_single_thread()
    config = Config.model_validate(settings["config"])
    work, name, columns = Path(settings["work_dir"]), settings["name"], settings["columns"]
    target = work / "models" / name
    if target.is_dir():
        return
    data = _training_data(work, columns)
    # One seed for all: the models differ by their labels alone.
    seed = derive_seed(config.seed, "preference")

    def build() -> Any:
        return _new_model(config, settings["backbone"], columns, seed)

    options: dict[str, Any] = {
        "seed": seed,
        "checkpoint_dir": work / "checkpoints" / name,
        # One file for all workers of a training: the first of them writes it.
        "on_step": ProgressFile(work / "progress" / f"{name}.json").write
        if current_ranks().rank == 0
        else None,
        "say": _Notes(work / "notes" / f"{name}.txt"),
    }
    if config.preference.trainer == "trl":
        from morlaif_ray.preference.trl_training import train_with_trl

        model, history = train_with_trl(build, data, config.preference, **options)
    else:
        model = build()
        history = train_preference_model(model, data, config.preference, **options)
        if current_ranks().sharded:
            weights = whole_weights(model)
            if current_ranks().rank > 0:
                return
            model = build()
            model.model.load_state_dict(weights)
    write_csv(
        work / "losses" / f"{name}.csv",
        [{"model": name, "step": item.step, "loss": item.loss} for item in history],
    )
    model.model.to("cpu")
    temporary = target.with_name(f".{name}.partial")
    model.save(temporary)
    temporary.rename(target)


def _new_model(config: Config, backbone: str, columns: Sequence[str], seed: int) -> Any:
    """An untrained preference model with one head per label column, on the GPU where there is one."""
    from morlaif_ray.preference.model import PreferenceModel

    preference = config.preference
    frozen = preference.lora is not None and config.model.kind == "pretrained"
    model = PreferenceModel.from_backbone(
        backbone,
        columns,
        max_length=preference.max_length,
        seed=seed,
        lora=preference.lora,
        # Frozen base weights may be bfloat16; weights that train stay float32, or small updates would round away.
        dtype=config.model.dtype if frozen else "float32",
        topology=preference.topology,
        branch_blocks=preference.branch_blocks,
    )
    model.tokens_per_batch = preference.train_tokens_per_batch
    model.last_block_at_end = preference.last_block_at_end
    _to_gpu(model)
    return model


def _training_data(work: Path, columns: Sequence[str]) -> Any:
    """The pairs with at least one of these labels."""
    from morlaif_ray.preference.training import TrainingData

    table = read_table(work / "train.parquet")
    log_odds = np.array([table[column] for column in columns], dtype=np.float64).T
    rows = np.flatnonzero(~np.isnan(log_odds).all(axis=1))
    return TrainingData(
        texts_a=[table["text_a"][row] for row in rows],
        texts_b=[table["text_b"][row] for row in rows],
        log_odds_NH=log_odds[rows],
        pair_ids=[table["pair_id"][row] for row in rows],
    )


class _Notes:
    """Lines for the person who runs this: into the worker's log now, and from the driver at the end."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")


def _to_gpu(model: Any) -> None:
    import torch

    if torch.cuda.is_available():
        model.model.to("cuda")


def fit_preference_models(
    config: Config,
    work: Path,
    trainings: Mapping[str, Sequence[str]],
    backbone: str,
    advance: Callable[[int], None],
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Runs all trainings (name -> label columns, one head each); raises the first failure's own cause.

    `say` gets what the trainings had to note (memory that ran out and the micro-batch they went on with).
    """
    from ray import tune

    shutil.rmtree(work / "failures", ignore_errors=True)  # whoever starts again wants another try
    for folder in ("models", "losses", "progress", "checkpoints", "notes", "failures"):
        (work / folder).mkdir(exist_ok=True)
    open_names = [name for name in trainings if not (work / "models" / name).is_dir()]
    shared = {
        "config": config.model_dump(mode="json"),
        "work_dir": str(work),
        "backbone": backbone,
        "trainings": json.dumps({name: list(columns) for name, columns in trainings.items()}),
        "use_gpu": cluster_has_gpu(),
    }
    tuner = tune.Tuner(
        tune.with_resources(_trial, _trial_resources(config, shared["use_gpu"])),
        param_space={**shared, "name": tune.grid_search(open_names)},
        tune_config=tune.TuneConfig(max_concurrent_trials=config.preference.concurrent_trials),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=str(work / "ray_tune"),
            failure_config=tune.FailureConfig(max_failures=config.preference.max_failures),
            verbose=0,
        ),
    )
    try:
        if not open_names:
            return
        with following([work / "progress" / f"{name}.json" for name in trainings], advance):
            results = tuner.fit()
    finally:
        _tell_notes(work / "notes", say)
    if results.num_errors:
        for marker in sorted((work / "failures").glob("*.json")):
            raise _read_failure(marker)
        _raise_first(results)


def _tell_notes(folder: Path, say: Callable[[str], None]) -> None:
    """Says every note once: what was said is removed, what a killed driver left unsaid comes with the next call."""
    for path in sorted(folder.glob("*.txt")):
        for line in path.read_text(encoding="utf-8").splitlines():
            say(line)
        path.unlink()


def _trial_resources(config: Config, use_gpu: bool) -> dict[str, float]:
    """In-process training reserves for itself; otherwise the Ray Train worker does."""
    if config.preference.workers_per_trial:
        return {"cpu": 0.01}
    return {"cpu": config.preference.cpus_per_trial, "gpu": 1.0 if use_gpu else 0.0}


def _trial(parameters: dict[str, Any]) -> dict[str, Any]:
    """One Tune trial: a Ray Train trainer around `preference_loop`."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    config = Config.model_validate(parameters["config"])
    name = parameters["name"]
    num_workers = config.preference.workers_per_trial
    trainer = TorchTrainer(
        preference_loop,
        train_loop_config={
            "config": parameters["config"],
            "work_dir": parameters["work_dir"],
            "backbone": parameters["backbone"],
            "name": name,
            "columns": json.loads(parameters["trainings"])[name],
        },
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=bool(parameters["use_gpu"]) and num_workers > 0,
            resources_per_worker={"CPU": config.preference.cpus_per_trial} if num_workers else None,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(Path(parameters["work_dir"]) / "ray_train"),
            failure_config=FailureConfig(max_failures=config.preference.max_failures),
        ),
    )
    trainer.fit()
    return {"trained": 1}


def _raise_first(results: Any) -> None:
    error = next(iter(results.errors))
    cause = find_cause(error)
    if isinstance(cause, MorlaifError):
        raise cause from None
    text = str(error)
    for line in reversed(text.splitlines()):  # Tune hands over the trial's traceback as text
        if "morlaif_ray.errors." in line:
            raise ActorLostError(line.split(": ", 1)[-1].strip())
    last = text.strip().splitlines()[-1] if text.strip() else type(error).__name__
    raise ActorLostError(
        f"training of a preference model failed: {last}; see logs/ in the run folder"
    )
