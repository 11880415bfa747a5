"""What the SFT trainer calls in every Ray Train worker: progress for the driver, checkpoints for Ray Train."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def sft_callbacks(on_step: Callable[[int, int], None]) -> list[Any]:
    """Callbacks for `transformers.Trainer`; `on_step(done, total)` is called on rank 0 only.

    Rank 0 alone hands a checkpoint to Ray Train, once all ranks have saved their part of it. Ray's own
    `RayTrainReportCallback` uploads the same files from every rank at once: a worker lost at that moment leaves half a
    file, and the next attempt cannot start from it.
    """
    from accelerate import PartialState
    from ray import train
    from transformers import TrainerCallback
    from transformers.trainer_utils import get_last_checkpoint

    class ShowProgress(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                on_step(state.global_step, state.max_steps)

    class ReportCheckpoint(TrainerCallback):  # type: ignore[misc]
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            PartialState().wait_for_everyone()
            if not state.is_world_process_zero:
                train.report({})
                return
            metrics = {key: value for log in state.log_history for key, value in log.items()}
            with tempfile.TemporaryDirectory() as folder:
                shutil.copytree(get_last_checkpoint(args.output_dir), Path(folder) / "checkpoint")
                train.report(metrics, checkpoint=train.Checkpoint.from_directory(folder))

    return [ShowProgress(), ReportCheckpoint()]
