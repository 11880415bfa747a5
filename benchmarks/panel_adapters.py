"""A bank of adapters against PEFT: switching one adapter at a time, and PEFT's own mixed batch.

The peer is `set_adapter` and one forward per adapter over the whole batch, padded to its longest text as
`tokenizer(texts, padding=True)` does, adapters not merged. Both sides get the same tokens in arrival order and neither
tokenizes; both use the same library for matrix products. `batch8_of_equal_lengths` is the same without anything to pad.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.panel import in_turns, testbed_texts
from morlaif_ray.cpu_products import fast_products


def measure_adapters(
    backbone: str, names: Sequence[str], folder: Path, repetitions: int
) -> dict[str, Any]:
    """Speed of the bank relative to each of the peer's ways, and the largest difference of a score."""
    from morlaif_ray.backbone import encode_scored_texts
    from morlaif_ray.preference import AdapterBank
    from morlaif_ray.preference.batching import padded

    folders = make_adapters(backbone, names, folder)
    bank = AdapterBank.load(folders)
    peft = load_peft(backbone, dict(zip(names, folders, strict=True)), bank.tokenizer.pad_token_id)
    batches = {
        f"batch{num}": encode_scored_texts(bank.tokenizer, testbed_texts(num), bank.max_length)
        for num in (1, 8, 32)
    }
    batches["batch8_of_equal_lengths"] = [max(batches["batch8"], key=len)] * 8
    figures: dict[str, Any] = {"adapters_max_abs_diff": 0.0}
    for batch, ids in batches.items():
        tokens, mask = padded(ids, bank.tokenizer.pad_token_id, "cpu")
        rows = {"input_ids": tokens, "attention_mask": mask}
        work = {
            "bank": lambda ids=ids: torch.cat(bank.forward(ids, folders), dim=1),
            "switched": lambda rows=rows: switched(peft, names, rows),
            "mixed": lambda rows=rows: mixed(peft, names, rows),
        }
        spent = in_turns(work, repetitions)
        figures[f"adapters_speedup_{batch}"] = spent.ratio("switched", "bank")
        figures[f"adapters_speedup_{batch}_wall"] = spent.wall_ratio("switched", "bank")
        figures[f"adapters_speedup_vs_peft_mixed_{batch}"] = spent.ratio("mixed", "bank")
        scores = work["bank"]()
        # One row per text and adapter, adapters outermost.
        as_mixed = scores.T.reshape(-1, 1)
        for gap in (scores - work["switched"](), as_mixed - work["mixed"]()):
            figures["adapters_max_abs_diff"] = max(
                figures["adapters_max_abs_diff"], float(gap.abs().max())
            )
    return figures


def make_adapters(backbone: str, names: Sequence[str], folder: Path) -> list[str]:
    """Saves an untrained adapter per name, its second factor moved away from 0; returns the folders."""
    from morlaif_ray.config.inputs import LoraConfig
    from morlaif_ray.preference import PreferenceModel

    for index, name in enumerate(names):
        model = PreferenceModel.from_backbone(
            backbone, [name], max_length=512, seed=index, lora=LoraConfig()
        )
        torch.manual_seed(index)
        for place, parameter in model.model.named_parameters():
            if "lora_B" in place:
                torch.nn.init.normal_(parameter, std=0.02)
        model.save(folder / name)
    return [str(folder / name) for name in names]


def load_peft(backbone: str, folders: Mapping[str, str], pad: int) -> Any:
    """One PEFT model with all adapters."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    plain = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=1)
    plain.config.pad_token_id = pad
    (first, path), *others = folders.items()
    model = PeftModel.from_pretrained(plain, path, adapter_name=first)
    for name, path in others:
        model.load_adapter(path, adapter_name=name)
    return model.eval()


@torch.no_grad()
@fast_products()
def switched(peft: Any, names: Sequence[str], rows: Mapping[str, Any]) -> Any:
    """Scores [B, K], an adapter at a time."""
    columns = []
    for name in names:
        peft.set_adapter(name)
        columns.append(peft(**rows).logits[:, 0])
    return torch.stack(columns, dim=1)


@torch.no_grad()
@fast_products()
def mixed(peft: Any, names: Sequence[str], rows: Mapping[str, Any]) -> Any:
    """Scores [K*B, 1] of a batch that names an adapter per row."""
    tiled = {key: value.repeat(len(names), 1) for key, value in rows.items()}
    labels = [name for name in names for _ in range(len(rows["input_ids"]))]
    return peft(**tiled, adapter_names=labels).logits
