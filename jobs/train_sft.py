"""Stage 0: reads the data, splits it by prompt, and fine-tunes the target model on the `sft` split."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

from jobs.context import JobContext
from morlaif_ray.artifacts import file_hash, write_json, write_records
from morlaif_ray.config import Config
from morlaif_ray.config.inputs import FileSource, ScratchModel
from morlaif_ray.data import LoadedData, load_dataset_records
from morlaif_ray.errors import DataError
from morlaif_ray.types import Dialogue, Prompt, ResponsePair

STAGE = "0_sft"


def run(context: JobContext) -> None:
    stage = context.stage(
        STAGE,
        sections=["data", "model", "sft"],
        inputs=[],
        extra={"data_files": data_fingerprints(context.config)},
    )
    if stage.is_current():
        context.reporter.skipped(STAGE)
        return
    data = load_dataset_records(context.config)
    _report_data(context, data)
    work = stage.resumable_work_dir()
    _write_data(work, data)
    if context.config.sft.enabled:
        _fine_tune(context, work, data)
    else:
        _take_as_it_is(context, work)
    rows = {
        "prompts": len(data.prompts),
        "dialogues": len(data.dialogues),
        "dataset_pairs": len(data.pairs),
        "bad_rows": len(data.bad_rows),
    }
    with stage.writing(rows) as folder:
        for name in (
            "prompts.parquet",
            "dialogues.parquet",
            "dataset_pairs.parquet",
            "bad_rows.jsonl",
        ):
            shutil.copy2(work / name, folder / name)
        for name in ("training.csv", "metrics.json", "model.json"):
            if (work / name).is_file():
                shutil.copy2(work / name, folder / name)
        if (work / "model").is_dir():
            shutil.copytree(work / "model", folder / "model")
    shutil.rmtree(work)


def sft_model_path(context: JobContext) -> str:
    """Where the target model of this run lies: the SFT checkpoint, or the model that was taken as it is."""
    folder = context.path(STAGE, "model")
    if folder.is_dir():
        return str(folder)
    from morlaif_ray.artifacts import read_json

    return str(read_json(context.path(STAGE, "model.json"))["path"])


def _report_data(context: JobContext, data: LoadedData) -> None:
    by_split = ", ".join(
        f"{split} {sum(prompt.split == split for prompt in data.prompts)}"
        for split in ("sft", "preference", "weights", "test", "policy")
    )
    context.reporter.line(f"{STAGE}: {len(data.prompts)} prompts ({by_split})")
    if data.bad_rows:
        first = data.bad_rows[0]
        context.reporter.line(
            f"{STAGE}: {len(data.bad_rows)} bad rows skipped, listed in bad_rows.jsonl "
            f"(first: {first.file} line {first.line}: {first.reason})"
        )


def _write_data(work: Path, data: LoadedData) -> None:
    import json

    write_records(work / "prompts.parquet", data.prompts, Prompt)
    write_records(work / "dialogues.parquet", data.dialogues, Dialogue)
    write_records(work / "dataset_pairs.parquet", data.pairs, ResponsePair)
    with (work / "bad_rows.jsonl").open("w", encoding="utf-8") as stream:
        for row in data.bad_rows:
            stream.write(json.dumps(asdict(row), ensure_ascii=False, default=str) + "\n")


def _fine_tune(context: JobContext, work: Path, data: LoadedData) -> None:
    from actors.training import fit_sft

    config = context.config
    if not data.dialogues:
        raise DataError(
            "the sft split holds no dialogue; raise data.splits.sft or set sft.enabled=false"
        )
    if isinstance(config.model, ScratchModel):
        from morlaif_ray.backbone import build_word_tokenizer, dialogue_text

        texts = [dialogue_text(d.prompt, d.response) for d in data.dialogues]
        texts += [prompt.text for prompt in data.prompts]
        tokenizer = build_word_tokenizer(
            texts, vocabulary_size=config.model.vocabulary_size, max_length=config.model.max_length
        )
        tokenizer.save_pretrained(work / "tokenizer")
        source = str(work / "tokenizer")
    else:
        source = config.model.path
    context.connect()
    with context.reporter.task("SFT", total=config.sft.num_steps, unit="steps") as task:
        fit_sft(config, work, source, task.advance)


def _take_as_it_is(context: JobContext, work: Path) -> None:
    model = context.config.model
    if isinstance(model, ScratchModel):
        raise DataError(
            "sft.enabled is false but model.kind is 'scratch', which knows nothing untrained; enable sft"
        )
    write_json(work / "model.json", {"path": model.path, "revision": model.revision})


def data_fingerprints(config: Config) -> dict[str, str]:
    """File name -> SHA-256 of the local data files, so a file changed under its name is noticed."""
    source = config.data.source
    if not isinstance(source, FileSource):
        return {}
    files: list[Path] = []
    for path in source.paths:
        files += sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return {path.name: file_hash(path) for path in files if path.is_file()}
