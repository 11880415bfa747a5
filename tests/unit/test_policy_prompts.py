"""What is known to be wrong with prompts and tokenizer before PPO, or anything, starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.checks import _check_tokenizer, check_policy_prompts
from jobs.context import JobContext
from jobs.progress import Reporter
from jobs.prompt_schedule import PromptSchedule
from morlaif_ray.artifacts import write_records
from morlaif_ray.backbone import build_word_tokenizer
from morlaif_ray.config.loading import parse_config
from morlaif_ray.errors import ArtifactError, ConfigError, DataError
from morlaif_ray.types import Prompt

pytestmark = [pytest.mark.unit]


class Said(Reporter):
    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def make_context(run_dir: Path, lengths: list[int], **policy: Any) -> JobContext:
    """A run whose target model has 64 positions and whose policy prompts have so many words."""
    model = run_dir / "0_sft" / "model"
    model.mkdir(parents=True)
    build_word_tokenizer(["red"], vocabulary_size=9, max_length=64).save_pretrained(model)
    (model / "config.json").write_text(json.dumps({"n_positions": 64}))
    prompts = [
        Prompt(str(row), "red " * num + str(row), "policy") for row, num in enumerate(lengths)
    ]
    prompts.append(Prompt("other", "red " * 500, "test"))
    write_records(run_dir / "0_sft" / "prompts.parquet", prompts, Prompt)
    return JobContext(parse_config({"policy": policy}, "x"), run_dir, Said())


def test_prompts_that_lose_their_beginning_are_counted(tmp_path: Path) -> None:
    context = make_context(tmp_path, [10, 31, 32, 70], max_new_tokens=32)
    check_policy_prompts(context)
    assert isinstance(context.reporter, Said)
    (line,) = context.reporter.lines
    assert line.startswith(
        "2 of 4 policy prompts are longer than the 32 tokens that policy.max_new_tokens leaves of "
    )


def test_prompts_that_fit_are_not_spoken_of(tmp_path: Path) -> None:
    context = make_context(tmp_path, [1, 31], max_new_tokens=32)
    check_policy_prompts(context)
    assert isinstance(context.reporter, Said)
    assert context.reporter.lines == []


def test_no_room_for_any_prompt_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"policy\.max_new_tokens 64 leaves no room .* 64 positions"
    ):
        check_policy_prompts(make_context(tmp_path, [3], max_new_tokens=64))


def test_no_prompt_at_all_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no prompt in the split policy; raise data\.splits\.pol"):
        check_policy_prompts(make_context(tmp_path, [], max_new_tokens=8))


def test_a_tokenizer_without_eos_is_named_before_anything_starts(tmp_path: Path) -> None:
    config = parse_config({"model": {"kind": "pretrained", "path": str(tmp_path)}}, "x")
    _check_tokenizer(config)  # no files to read: the loader will say
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({"eos_token": None, "pad_token": "<pad>"}))
    with pytest.raises(ArtifactError, match="the tokenizer has no EOS token; add one and save it"):
        _check_tokenizer(config)
    settings.write_text(json.dumps({"eos_token": "</s>"}))
    _check_tokenizer(config)


def test_a_step_repeats_each_prompt_and_the_next_goes_on_where_it_ended(tmp_path: Path) -> None:
    context = make_context(
        tmp_path, [1, 2, 3, 4, 5, 6], batch_size=6, samples_per_prompt=3, max_new_tokens=8
    )
    schedule = PromptSchedule(context)
    steps = [schedule.prompts_of(step) for step in range(3)]
    for prompts in steps:
        assert len(prompts) == 6
        assert prompts[0] == prompts[1] == prompts[2] != prompts[3] == prompts[4] == prompts[5]
    assert len({text for prompts in steps for text in prompts}) == 6  # one epoch, none twice
