"""Supervised fine-tuning of the target model with TRL's `SFTTrainer`, loss on response tokens only.

Runs inside a Ray Train worker or a plain process: the caller passes callbacks and a checkpoint to resume from.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from morlaif_ray.backbone import build_scratch_model, dialogue_text, load_causal_lm
from morlaif_ray.config.inputs import LoraConfig, ModelConfig, ScratchModel, SftConfig
from morlaif_ray.types import Dialogue

IGNORED = -100
"""Label of tokens that carry no loss."""


def encode_dialogues(
    tokenizer: Any, dialogues: Sequence[Dialogue], max_length: int
) -> list[dict[str, list[int]]]:
    """`input_ids` and `labels` of each dialogue: prompt tokens ignored, EOS learned.

    A dialogue that is too long loses its oldest prompt tokens first, then the end of its response.
    """
    if not dialogues:
        return []
    # One call for all: a fast tokenizer is many times faster on a batch.
    texts = [dialogue_text(item.prompt, item.response) for item in dialogues]
    whole = tokenizer(texts, add_special_tokens=True)["input_ids"]
    prompts = tokenizer([item.prompt for item in dialogues], add_special_tokens=True)["input_ids"]
    rows = []
    for ids, prompt in zip(whole, prompts, strict=True):
        response = [*ids[len(prompt) :], tokenizer.eos_token_id][: max_length - 1]
        kept = prompt[-(max_length - len(response)) :]
        rows.append({"input_ids": kept + response, "labels": [IGNORED] * len(kept) + response})
    return rows


def build_sft_trainer(
    config: SftConfig,
    model_config: ModelConfig,
    tokenizer: Any,
    dialogues: Sequence[Dialogue],
    heldout: Sequence[Dialogue],
    *,
    output_dir: Path,
    seed: int,
    num_workers: int,
    callbacks: list[Any],
) -> Any:
    """An `SFTTrainer` ready to train; `num_workers` data-parallel ranks share `config.batch_size`."""
    import datasets
    from trl import SFTTrainer

    if isinstance(model_config, ScratchModel):
        model = build_scratch_model(model_config, tokenizer, seed)
    else:
        model = load_causal_lm(
            model_config.path, dtype=model_config.dtype, revision=model_config.revision
        )

    def encoded(items: Sequence[Dialogue]) -> Any:
        return datasets.Dataset.from_list(
            encode_dialogues(tokenizer, items, model_config.max_length)
        )

    return SFTTrainer(
        model=model,
        args=_trl_config(config, model_config, output_dir, seed, num_workers),
        train_dataset=encoded(dialogues),
        eval_dataset=encoded(heldout) if heldout else None,
        processing_class=tokenizer,
        callbacks=callbacks,
        peft_config=_peft(config.lora),
    )


def _trl_config(
    config: SftConfig, model_config: ModelConfig, output_dir: Path, seed: int, num_workers: int
) -> Any:
    """TRL's settings: cosine schedule, checkpoints by step, no reporting of its own, bf16 on GPU only."""
    import torch
    from trl import SFTConfig as TrlConfig

    on_gpu = torch.cuda.is_available()
    return TrlConfig(
        output_dir=str(output_dir),
        max_steps=config.num_steps,
        per_device_train_batch_size=config.batch_size // num_workers,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=min(config.warmup_steps, max(1, config.num_steps // 4)),
        optim="adamw_torch",
        bf16=on_gpu,
        use_cpu=not on_gpu,
        gradient_checkpointing=on_gpu,
        max_length=model_config.max_length,
        logging_steps=max(1, config.num_steps // 100),
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=config.checkpoint_every,
        save_total_limit=2,
        report_to=[],
        seed=seed % (1 << 31),
        data_seed=seed % (1 << 31),
        dataloader_num_workers=0,
        dataset_kwargs={"skip_prepare_dataset": True},
        train_sampling_strategy="group_by_length",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
    )


def _peft(lora: LoraConfig | None) -> Any:
    if lora is None:
        return None
    from peft import LoraConfig as PeftLora
    from peft import TaskType

    return PeftLora(
        task_type=TaskType.CAUSAL_LM,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
    )
