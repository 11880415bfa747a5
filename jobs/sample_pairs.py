"""Stage 1: two responses per prompt, sampled from the target model by rollout actors, or taken from the data set."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.engines import engine_extra
from jobs.context import JobContext
from jobs.train_sft import sft_model_path
from morlaif_ray.artifacts import read_json, read_records, write_json, write_records, write_table
from morlaif_ray.config import Config
from morlaif_ray.errors import DataError
from morlaif_ray.seeding import derive_seed, stable_hash
from morlaif_ray.types import GenerationRequest, Prompt, ResponsePair

STAGE = "1_pairs"
PAIR_SPLITS = ("preference", "weights", "test")


def run(context: JobContext) -> None:
    # Where a response ends is set in section `policy`, once for all sampling.
    stage = context.stage(
        STAGE,
        sections=["pairs"],
        inputs=["0_sft"],
        extra={"stop": list(context.config.policy.stop), **engine_extra(context.config)},
    )
    if stage.is_current():
        context.reporter.skipped(STAGE)
        return
    work = stage.resumable_work_dir()
    if context.config.pairs.kind == "dataset":
        candidates = read_records(context.path("0_sft", "dataset_pairs.parquet"), ResponsePair)
        candidates = [pair for pair in candidates if pair.split in PAIR_SPLITS]
        reference = _sample_responses(context, work, _reference_requests(context))
    else:
        candidates, reference = _sample(context, work)
    pairs = [pair for pair in candidates if pair.response_a.strip() != pair.response_b.strip()]
    _check(pairs, len(candidates))
    with stage.writing({"pairs": len(pairs)}) as folder:
        write_records(folder / "pairs.parquet", pairs, ResponsePair)
        write_table(folder / "reference.parquet", reference)
        write_json(folder / "metrics.json", _metrics(context.config, pairs, len(candidates)))
    shutil.rmtree(work)
    context.reporter.line(
        f"{STAGE}: {len(pairs)} pairs, {len(candidates) - len(pairs)} identical ones dropped"
    )


def _check(pairs: Sequence[ResponsePair], num_candidates: int) -> None:
    if num_candidates == 0:
        raise DataError(
            "no prompt in the splits preference, weights and test; raise their data.splits shares"
        )
    if not pairs:
        raise DataError(
            f"all {num_candidates} pairs hold two identical responses, so there is nothing to compare; raise "
            f"pairs.temperature, or look at the data set"
        )
    for split in PAIR_SPLITS:
        if not any(pair.split == split for pair in pairs):
            raise DataError(f"no pair in split '{split}'; raise data.splits.{split}")


def _sample(context: JobContext, work: Path) -> tuple[list[ResponsePair], dict[str, list[str]]]:
    """(pairs, reference responses), generated in one go."""
    config = context.config
    prompts = [
        prompt
        for prompt in read_records(context.path("0_sft", "prompts.parquet"), Prompt)
        if prompt.split in PAIR_SPLITS
    ]
    requests = [
        GenerationRequest(prompt.text, derive_seed(config.seed, "pairs", prompt.prompt_id, slot))
        for prompt in prompts
        for slot in (0, 1)
    ]
    extra = _reference_requests(context)
    everything = _sample_responses(context, work, requests + extra)
    texts = everything["response"]
    pairs = [
        _pair(config, prompt, texts[2 * row], texts[2 * row + 1])
        for row, prompt in enumerate(prompts)
    ]
    return pairs, {name: column[len(requests) :] for name, column in everything.items()}


def _reference_requests(context: JobContext) -> list[GenerationRequest]:
    """Requests for the responses on which score normalisers are fitted: the SFT model on `policy` prompts."""
    prompts = [
        prompt
        for prompt in read_records(context.path("0_sft", "prompts.parquet"), Prompt)
        if prompt.split == "policy"
    ]
    if not prompts:
        raise DataError("no prompt in the split policy; raise data.splits.policy")
    return [
        GenerationRequest(
            prompts[index % len(prompts)].text, derive_seed(context.config.seed, "reference", index)
        )
        for index in range(context.config.pairs.num_reference)
    ]


def _sample_responses(
    context: JobContext, work: Path, requests: list[GenerationRequest]
) -> dict[str, list[str]]:
    """One response per request as columns `prompt`, `response`; finished chunks survive a kill in the work folder."""
    from actors.rollout_pool import RolloutPool
    from morlaif_ray.rl.generation import SamplingSettings

    pairs = context.config.pairs
    chunks = [requests[i : i + pairs.batch_size] for i in range(0, len(requests), pairs.batch_size)]
    files = [work / f"chunk-{index:06d}.json" for index in range(len(chunks))]
    missing = [index for index, path in enumerate(files) if not path.is_file()]
    settings = SamplingSettings(
        pairs.max_new_tokens, pairs.temperature, stop=tuple(context.config.policy.stop)
    )
    if missing:
        context.connect()
        pool = RolloutPool(
            context.config, sft_model_path(context), pairs.num_workers, context.reporter.line
        )
        with context.reporter.task("pairs", total=len(requests), unit="responses") as task:
            task.advance(sum(len(chunk) for i, chunk in enumerate(chunks) if files[i].is_file()))

            def keep(place: int, batch: Any) -> None:
                write_json(files[missing[place]], list(batch.responses))
                task.advance(len(batch))

            pool.map([chunks[index] for index in missing], settings, keep)
        pool.close()
    responses = [text for path in files for text in read_json(path)]
    return {"prompt": [request.prompt for request in requests], "response": responses}


def _pair(config: Config, prompt: Prompt, first: str, second: str) -> ResponsePair:
    label = float("nan")
    if config.on_testbed:
        from morlaif_ray.testbed import human_preference

        label = human_preference(prompt.text, first, second, config.seed).label
    return ResponsePair(
        pair_id=stable_hash(prompt.text, first, second)[:24],
        prompt_id=prompt.prompt_id,
        prompt=prompt.text,
        response_a=first,
        response_b=second,
        split=prompt.split,
        human_label=label,
    )


def _metrics(config: Config, pairs: Sequence[ResponsePair], num_candidates: int) -> dict[str, Any]:
    texts = [(pair.prompt, text) for pair in pairs for text in (pair.response_a, pair.response_b)]
    well_formed = float("nan")
    if config.on_testbed:
        from morlaif_ray.testbed import read_response

        well_formed = sum(read_response(*text).well_formed for text in texts) / len(texts)
    return {
        "num_pairs": len(pairs),
        "num_identical": num_candidates - len(pairs),
        "num_by_split": {
            split: sum(pair.split == split for pair in pairs) for split in PAIR_SPLITS
        },
        "well_formed_share": well_formed,
        "mean_response_words": sum(len(text.split()) for _, text in texts) / len(texts),
    }
