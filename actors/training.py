"""Ray Train and Ray Tune around the library's trainers: SFT workers, and one Tune trial per preference model.

The `*_loop` functions run inside a Ray Train worker; `fit_*` functions run in the driver, show progress and return when
the work is done. Workers share the run folder with the driver (one machine, or a shared file system on a cluster).
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from morlaif_ray.artifacts import read_records, write_csv, write_json
from morlaif_ray.config import Config
from morlaif_ray.errors import ActorLostError, MorlaifError, NumericalError, ResourceError
from morlaif_ray.seeding import derive_seed
from morlaif_ray.types import Dialogue

PROGRESS_INTERVAL_S = 0.5
NUM_HELDOUT_DIALOGUES = 256


def set_single_thread() -> None:
    """One torch thread per process on CPU: threads that contend cost more than they give."""
    import torch

    if not torch.cuda.is_available():
        torch.set_num_threads(1)


class ProgressFile:
    """A worker says how far it is; the driver reads it. A lost update only delays a bar."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written = 0.0

    def write(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._written < PROGRESS_INTERVAL_S and done < total:
            return
        self._written = now
        temporary = self._path.with_suffix(".partial")
        temporary.write_text(json.dumps([done, total]), encoding="utf-8")
        temporary.replace(self._path)

    def read(self) -> tuple[int, int]:
        try:
            done, total = json.loads(self._path.read_text(encoding="utf-8"))
            return int(done), int(total)
        except (OSError, ValueError):
            return 0, 0


@contextmanager
def following(paths: Sequence[Path], advance: Callable[[int], None]) -> Iterator[None]:
    """Feeds the sum of several progress files to a progress bar while the block runs."""
    stop = threading.Event()
    shown = 0

    def follow() -> None:
        nonlocal shown
        while True:
            finished = stop.wait(PROGRESS_INTERVAL_S)
            done = sum(ProgressFile(path).read()[0] for path in paths)
            if done > shown:
                advance(done - shown)
                shown = done
            if finished:
                return

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


# ---------------------------------------------------------------- SFT


def sft_loop(settings: Mapping[str, Any]) -> None:
    """One Ray Train worker of the SFT. Rank 0 leaves `model/`, `training.csv` and `metrics.json` in the work folder."""
    from ray import train
    from ray.train.huggingface.transformers import prepare_trainer

    from actors.sft_callbacks import sft_callbacks
    from morlaif_ray.backbone import load_tokenizer
    from morlaif_ray.cpu_products import fast_products
    from morlaif_ray.rl.sft import build_sft_trainer

    set_single_thread()
    work = Path(settings["work_dir"])
    config = Config.model_validate(settings["config"])
    world = train.get_context()
    checkpoint = train.get_checkpoint()
    progress = ProgressFile(work / "progress.json")

    dialogues = read_records(work / "dialogues.parquet", Dialogue)
    num_heldout = min(NUM_HELDOUT_DIALOGUES, len(dialogues) // 20)
    trainer = build_sft_trainer(
        config.sft,
        config.model,
        load_tokenizer(settings["tokenizer"]),
        dialogues[num_heldout:],
        dialogues[:num_heldout],
        output_dir=work / "trainer",
        seed=derive_seed(config.seed, "sft"),
        num_workers=world.get_world_size(),
        callbacks=sft_callbacks(progress.write),
    )
    _mute(trainer)
    trainer = prepare_trainer(trainer)
    with fast_products():
        if checkpoint is None:
            trainer.train()
        else:
            with checkpoint.as_directory() as folder:
                _resume(trainer, Path(folder) / "checkpoint", config.sft.num_steps)
    heldout = trainer.evaluate() if num_heldout else {}
    if world.get_world_rank() == 0:
        _leave_sft_results(trainer, work, len(dialogues), heldout)


def _resume(trainer: Any, folder: Path, num_steps: int) -> None:
    """Goes on from a checkpoint. From one of the last step `Trainer.train` would take one step too many."""
    from transformers import TrainerState

    state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
    if state.global_step < num_steps:
        trainer.train(resume_from_checkpoint=str(folder))
        return
    trainer._load_from_checkpoint(str(folder))
    trainer.state = state


def _mute(trainer: Any) -> None:
    """Drops the callbacks that print every log record."""
    from transformers import PrinterCallback, ProgressCallback

    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)


def _leave_sft_results(
    trainer: Any, work: Path, num_dialogues: int, heldout: Mapping[str, Any]
) -> None:
    from morlaif_ray.backbone import save_pretrained

    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    save_pretrained(model, trainer.processing_class, work / "model")
    records = [record for record in trainer.state.log_history if "loss" in record]
    write_csv(
        work / "training.csv",
        [
            {
                "step": r["step"],
                "loss": float(r["loss"]),
                "learning_rate": float(r["learning_rate"]),
            }
            for r in records
        ],
    )
    final = float(records[-1]["loss"]) if records else float("nan")
    if final != final:
        raise NumericalError("SFT: the loss is NaN; lower sft.learning_rate")
    write_json(
        work / "metrics.json",
        {
            "num_parameters": sum(p.numel() for p in model.parameters()),
            "num_dialogues": num_dialogues,
            "final_loss": final,
            "heldout_loss": heldout.get("eval_loss", float("nan")),
        },
    )


def fit_sft(config: Config, work: Path, tokenizer: str, advance: Callable[[int], None]) -> None:
    """Trains the target model on Ray Train; same work folder + same call resumes from the last checkpoint."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    use_gpu = cluster_has_gpu()
    trainer = TorchTrainer(
        sft_loop,
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "work_dir": str(work),
            "tokenizer": tokenizer,
        },
        scaling_config=ScalingConfig(num_workers=config.sft.num_workers, use_gpu=use_gpu),
        run_config=RunConfig(
            name="sft",
            storage_path=str(work / "ray_train"),
            failure_config=FailureConfig(max_failures=1),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    with following([work / "progress.json"], advance):
        _fit(trainer, "SFT")


def cluster_has_gpu() -> bool:
    import ray

    return float(ray.cluster_resources().get("GPU", 0.0)) >= 1.0


def _fit(trainer: Any, what: str) -> None:
    """Runs `.fit()` and turns Ray Train's wrapping into the worker's own one-line cause."""
    from ray.train import TrainingFailedError

    try:
        _interruptible(trainer.fit)
    except TrainingFailedError as error:
        cause = find_cause(error)
        if isinstance(cause, MorlaifError):
            raise cause from error
        raise ActorLostError(
            f"{what}: training failed ({cause}); see logs/ in the run folder"
        ) from error


def _interruptible(work: Callable[[], Any]) -> None:
    """Runs `work` beside the main thread, so that Ctrl-C ends the job.

    On the main thread `TorchTrainer.fit` takes SIGINT for itself, for good: the first Ctrl-C of any later stage would
    then end the process with exit code 0 and without a checkpoint.
    """
    failure: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - handed over to the caller's thread
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]


def find_cause(error: BaseException) -> BaseException:
    """Our own error inside Ray's wrappers, else the innermost one."""
    seen: list[BaseException] = []
    queue: list[BaseException] = [error]
    while queue:
        item = queue.pop(0)
        if item in seen:
            continue
        seen.append(item)
        if isinstance(item, MorlaifError):
            return item
        failures = getattr(item, "worker_failures", None)
        if isinstance(failures, Mapping):
            queue += [
                failure for failure in failures.values() if isinstance(failure, BaseException)
            ]
        queue += [
            x
            for x in (item.__cause__, getattr(item, "cause", None), item.__context__)
            if isinstance(x, BaseException)
        ]
    return seen[-1]


def require_resource(condition: bool, message: str) -> None:
    if not condition:
        raise ResourceError(message)
