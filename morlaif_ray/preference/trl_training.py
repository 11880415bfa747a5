"""The paper's recipe by TRL's `RewardTrainer`: hard labels with margin |log-odds|, one head, full or LoRA.

The rows go in as token ids of our own template (EOS appended, the end of the dialogue kept), in the order of our own
batch plan and at our own learning rate, so both trainers take the same steps where the batch size divides the number of
pairs (TRL fills the short batch of an epoch with the next rows); what comes out is the same folder.
Two things of TRL and transformers are stepped around: TRL drops rows above `max_length` (ours are cut before), and
transformers takes the last token that is not the pad *id* (with pad = EOS that would be the one before EOS).
Legend: N pairs.
"""

from __future__ import annotations

import copy
import gc
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from morlaif_ray.config.preferring import PreferenceConfig
from morlaif_ray.cpu_products import fast_products
from morlaif_ray.errors import ConfigError, NumericalError, ResourceError
from morlaif_ray.preference.labels import targets
from morlaif_ray.preference.model import PreferenceModel
from morlaif_ray.preference.stepping import MAX_GRAD_NORM, autocast_dtype, is_out_of_memory
from morlaif_ray.preference.training import (
    TrainingData,
    TrainingStep,
    batch_note,
    plan_batches,
    rate_factor,
)
from morlaif_ray.types import IntArray

STATE_FILE = "trainer_state.json"
"""Written last into a checkpoint of transformers: a checkpoint without it is half of one."""


@dataclass(frozen=True)
class PreferredFirst:
    """Pairs as TRL wants them. Ties are left out: a hard label cannot say "equal"."""

    chosen_ids: list[list[int]]
    rejected_ids: list[list[int]]
    margins: list[float]
    pair_ids: list[str]
    num_ties: int


def preferred_first(model: PreferenceModel, data: TrainingData) -> PreferredFirst:
    """Turns pairs with log-odds into chosen and rejected token ids; rows without a judgement are left out."""
    labels_N1, margins_N1 = targets(data.log_odds_NH, "margin")
    labels, margins = labels_N1[:, 0], margins_N1[:, 0]
    ids_a, ids_b = model.encode(data.texts_a), model.encode(data.texts_b)
    rows = [row for row in range(len(labels)) if labels[row] in (0.0, 1.0)]
    first = [labels[row] == 1.0 for row in rows]
    return PreferredFirst(
        [ids_a[row] if a else ids_b[row] for row, a in zip(rows, first, strict=True)],
        [ids_b[row] if a else ids_a[row] for row, a in zip(rows, first, strict=True)],
        [float(margins[row]) for row in rows],
        [data.pair_ids[row] for row in rows],
        int((labels == 0.5).sum()),
    )


def train_with_trl(
    build: Callable[[], PreferenceModel],
    data: TrainingData,
    config: PreferenceConfig,
    *,
    seed: int,
    checkpoint_dir: Path,
    on_step: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[PreferenceModel, list[TrainingStep]]:
    """Trains a model that `build` makes and returns it with one record per step; resumes from its last checkpoint.

    Args:
        build: a new model of one head; called again where memory runs out, with half the micro-batch.

    Raises:
        NumericalError: loss or gradient not finite, with the pairs of the batch (also in `failed_batch.json`).
        ResourceError: memory runs out with a micro-batch of one pair.
        ConfigError: the backbone is an encoder.
    """
    micro = config.microbatch_size or config.batch_size
    while True:
        run: _Run | None = None
        model = build()
        if model.is_encoder:
            raise ConfigError(
                "preference.trainer is 'trl', which reads the score at the last token, and preference.backbone is an "
                "encoder; write trainer: own"
            )
        pairs = preferred_first(model, data)
        lengths = np.array(
            [max(len(a), len(b)) for a, b in zip(pairs.chosen_ids, pairs.rejected_ids, strict=True)]
        )
        batches = plan_batches(lengths, config.batch_size, config.num_epochs, seed)
        order = np.concatenate(batches)
        try:
            run = _Run(model, pairs, order, config, seed, micro, checkpoint_dir, on_step)
            with fast_products():
                history = run.train()
            break
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            name = model.heads[0]
            micro = _smaller(micro, name, error)
        del model, run  # the next try must not find this model, its gradients and moments in memory
        _release_memory()
        say(
            f"preference model '{name}': out of memory; going on from the last checkpoint with {micro} "
            f"pairs per forward and accumulated gradients (set preference.microbatch_size to begin there)"
        )
    if pairs.num_ties:
        say(
            f"preference model '{model.heads[0]}': {pairs.num_ties} ties left out (hard labels cannot say equal)"
        )
    return model, history


def _release_memory() -> None:
    """Ends what only reference cycles keep alive (TRL's trainer and its callback hold one another)."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _smaller(micro: int, name: str, error: BaseException) -> int:
    """The next micro-batch that divides this one; ResourceError after 1."""
    if micro == 1:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ResourceError(
            f"preference model '{name}': a single pair does not fit into memory ({cause}); set "
            f"preference.gradient_checkpointing, lower preference.max_length, or train adapters "
            f"(preference.lora)"
        ) from None
    return next(size for size in range(micro // 2, 0, -1) if micro % size == 0)


class _Run:
    """One life of TRL's trainer around a model."""

    def __init__(
        self,
        model: PreferenceModel,
        pairs: PreferredFirst,
        order: IntArray,
        config: PreferenceConfig,
        seed: int,
        micro: int,
        folder: Path,
        on_step: Callable[[int, int], None] | None,
    ) -> None:
        self.model, self.pairs, self.order, self.config = model, pairs, order, config
        self.folder = folder
        self.num_steps = math.ceil(len(order) / config.batch_size)
        self._on_step = on_step
        self._pad = model.model.config.pad_token_id
        self.trainer = self._build(seed, micro)

    def train(self) -> list[TrainingStep]:
        from transformers import TrainerState

        last = _last_checkpoint(self.folder)
        state = None if last is None else TrainerState.load_from_json(str(last / STATE_FILE))
        if last is not None and state is not None and state.global_step >= self.num_steps:
            self.trainer._load_from_checkpoint(str(last))  # `train` would take one step too many
            self.trainer.state = state
        else:
            self.trainer.train(resume_from_checkpoint=None if last is None else str(last))
        self.model.model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        self.model.model.config.pad_token_id = self._pad
        self.model.model.eval()
        logged = [record for record in self.trainer.state.log_history if "loss" in record]
        return [
            TrainingStep(r["step"], float(r["loss"]), float(r["learning_rate"])) for r in logged
        ]

    def _build(self, seed: int, micro: int) -> Any:
        import datasets
        import torch
        from transformers import PrinterCallback, ProgressCallback
        from trl import RewardTrainer

        rows = [int(row) for row in self.order]
        dataset = datasets.Dataset.from_dict(
            {
                "chosen_ids": [self.pairs.chosen_ids[row] for row in rows],
                "rejected_ids": [self.pairs.rejected_ids[row] for row in rows],
                "margin": [self.pairs.margins[row] for row in rows],
            }
        )
        trained = [p for p in self.model.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=self.config.learning_rate, betas=self.config.adam_betas, weight_decay=0.0
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: rate_factor(step, self.num_steps, self.config.warmup_steps)
        )
        trainer = RewardTrainer(
            model=self.model.model,
            args=self._settings(seed, micro),
            train_dataset=dataset,
            processing_class=_with_own_pad(self.model.tokenizer),
            optimizers=(optimizer, schedule),
            callbacks=[self._callback()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        return trainer

    def _settings(self, seed: int, micro: int) -> Any:
        import torch
        from trl import RewardConfig as TrlConfig

        on_gpu = torch.cuda.is_available()
        config = self.config
        low = autocast_dtype(config.precision, "cuda" if on_gpu else "cpu")
        return TrlConfig(
            output_dir=str(self.folder),
            num_train_epochs=1,  # the rows of all epochs stand one after the other
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=config.batch_size // micro,
            max_grad_norm=MAX_GRAD_NORM,
            center_rewards_coefficient=config.centering or None,
            disable_dropout=False,
            max_length=None,
            bf16=low is not None,
            use_cpu=not on_gpu,
            gradient_checkpointing=config.gradient_checkpointing,
            train_sampling_strategy="sequential",
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="steps",
            save_steps=config.checkpoint_every,
            save_total_limit=2,
            report_to=[],
            seed=seed % (1 << 31),
            dataloader_num_workers=0,
            dataloader_pin_memory=on_gpu,
            disable_tqdm=True,
            ddp_find_unused_parameters=False,
        )

    def _callback(self) -> Any:
        from transformers import TrainerCallback

        run = self

        class Watch(TrainerCallback):  # type: ignore[misc]
            def on_log(
                self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any
            ) -> None:
                for what in ("loss", "grad_norm"):
                    value = float((logs or {}).get(what, 0.0))
                    if not math.isfinite(value):
                        run.stop_at(state.global_step - 1, what, value)

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if run._on_step is not None and state.is_world_process_zero:
                    run._on_step(state.global_step, run.num_steps)

        return Watch()

    def stop_at(self, step: int, what: str, value: float) -> None:
        size = self.config.batch_size
        keys = [self.pairs.pair_ids[row] for row in self.order[step * size : (step + 1) * size]]
        note = batch_note(self.folder, self.model.heads, step, {what: str(value)}, keys)
        raise NumericalError(
            f"preference model '{self.model.heads[0]}': {what} is {value} at step {step} ({note}); lower "
            f"preference.learning_rate or look at those pairs"
        )


def _with_own_pad(tokenizer: Any) -> Any:
    """A copy whose pad token is not its EOS: transformers would skip EOS together with the padding."""
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        other = 0 if tokenizer.eos_token_id != 0 else 1
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(other)
    return tokenizer


def _last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; halves that a killed process left are removed."""
    whole = []
    for path in folder.glob("checkpoint-*"):
        if (path / STATE_FILE).is_file():
            whole.append(path)
        else:
            shutil.rmtree(path)
    return max(whole, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)
