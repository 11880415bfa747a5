"""A bad config, bad data or unusable principles end in one line that says what, where, and what to write instead."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.jobs.commands import ROOT, SMOKE, Ended, setting, small

pytestmark = pytest.mark.jobs


# ---------------------------------------------------------------- the config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("policy.num_step=3", "policy.num_step: unknown key; did you mean 'num_steps'?"),
        ("polcy.num_steps=3", "polcy: unknown key; did you mean 'policy'?"),
        (
            "data.source.num_promts=9",
            "data.source.num_promts: unknown key; did you mean 'num_prompts'?",
        ),
        (
            "policy.num_steps=many",
            "policy.num_steps: input should be a valid integer, unable to parse string as an integer (given: 'many')",
        ),
        ("seed=-1", "seed: input should be greater than or equal to 0 (given: -1)"),
        (
            "reward.lower_quantile=1.5",
            "reward.lower_quantile: input should be less than or equal to 1 (given: 1.5)",
        ),
    ],
)
def test_a_wrong_setting_is_named_with_what_to_write_instead(
    morlaif: Callable[..., Ended], tmp_path: Path, override: str, message: str
) -> None:
    ended = morlaif(
        "run", "--config", str(SMOKE), "--run-dir", str(tmp_path / "r"), "--set", override
    )
    assert ended == Ended(2, f"{SMOKE}: {message}")
    assert not (tmp_path / "r").exists()


def test_a_missing_config_file_points_to_the_examples(morlaif: Callable[..., Ended]) -> None:
    ended = morlaif("run", "--config", "no/such.yaml")
    assert ended == Ended(2, "no/such.yaml: no such config file; see configs/ for examples")


def test_a_config_that_is_not_utf8_names_the_byte(
    morlaif: Callable[..., Ended], tmp_path: Path
) -> None:
    path = tmp_path / "latin1.yaml"
    path.write_bytes("name: café\n".encode("latin-1"))
    assert morlaif("run", "--config", str(path)) == Ended(
        2, f"{path}: byte 9 is not UTF-8; save the file as UTF-8"
    )


# ---------------------------------------------------------------- data


def on_files(path: Path, run_dir: Path) -> list[str]:
    return [
        "run",
        "--config",
        str(ROOT / "configs" / "hh_small.yaml"),
        "--run-dir",
        str(run_dir),
        *setting(f"data.source.paths=[{path}]", "data.on_bad_row=error"),
    ]


def dialogue(prompt: str, answer: str) -> str:
    return f"\n\nHuman: {prompt}\n\nAssistant: {answer}"


def write_rows(path: Path, rows: list[tuple[str, str, str]]) -> None:
    lines = [
        json.dumps({"chosen": dialogue(p, chosen), "rejected": dialogue(p, rejected)})
        for p, chosen, rejected in rows
    ]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def test_a_missing_data_file_is_named_with_the_setting(
    morlaif: Callable[..., Ended], tmp_path: Path
) -> None:
    path = tmp_path / "none.jsonl"
    assert morlaif(*on_files(path, tmp_path / "run")) == Ended(
        2, f"{path}: no such file; set data.source.paths (e.g. --set data.source.paths=[FILE])"
    )


def test_an_empty_data_set_is_said_to_be_empty(
    morlaif: Callable[..., Ended], tmp_path: Path
) -> None:
    path = tmp_path / "empty.jsonl"
    path.touch()
    assert morlaif(*on_files(path, tmp_path / "run")) == Ended(
        2, f"{path}: the data set is empty; it holds no row"
    )


def test_a_data_set_of_identical_responses_has_nothing_to_prefer(
    morlaif: Callable[..., Ended], tmp_path: Path
) -> None:
    path = tmp_path / "same.jsonl"
    write_rows(path, [(f"what is {i}?", "a thing", "a thing") for i in range(20)])
    assert morlaif(*on_files(path, tmp_path / "run")) == Ended(
        2,
        f"{path}: the two responses are identical in all 20 usable rows; there is nothing to prefer",
    )


def test_bytes_that_are_not_utf8_are_named_by_line_with_the_way_round_them(
    morlaif: Callable[..., Ended], tmp_path: Path
) -> None:
    path = tmp_path / "bytes.jsonl"
    write_rows(path, [("what?", "this", "that")])
    path.write_bytes(path.read_bytes() + b'{"chosen": "\xff"}\n')
    assert morlaif(*on_files(path, tmp_path / "run")) == Ended(
        2,
        f"{path}: line 2: byte 13 (0xff) is not UTF-8; mend the row, or count and skip such rows "
        f"with --set data.on_bad_row=skip",
    )


def test_a_run_that_could_not_begin_may_be_begun_with_another_setting(
    morlaif: Callable[..., Ended], tmp_path: Path
) -> None:
    morlaif(*on_files(tmp_path / "none.jsonl", tmp_path / "run"))
    path = tmp_path / "empty.jsonl"
    path.touch()
    assert "the data set is empty" in morlaif(*on_files(path, tmp_path / "run")).error


# ---------------------------------------------------------------- principles and weights


def test_a_principle_without_a_file_gets_the_nearest_name(
    morlaif: Callable[..., Ended], tmp_path: Path
) -> None:
    ended = morlaif(*small(tmp_path / "run", *setting("feedback.principles=[detial]")))
    assert ended == Ended(
        2,
        "principle 'detial' has no file; did you mean 'detail'? "
        "(add detial.yaml to feedback.principles_dir to define it)",
    )


def test_a_principle_that_the_embedded_judge_cannot_measure_fails_before_any_stage(
    morlaif: Callable[..., Ended], tmp_path: Path
) -> None:
    (tmp_path / "brevity.yaml").write_text(
        "name: brevity\nstatement: short\nquestion: Which is short?\n"
    )
    words = setting(f"feedback.principles_dir={tmp_path}")
    ended = morlaif(*small(tmp_path / "run", *words))
    assert ended.code == 2
    assert ended.error.startswith(
        "the embedded rules judge (testbed) has no measure for principle 'brevity'"
    )


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            "{helpfulnes: 1}",
            "reward.weights: unknown principle 'helpfulnes'; did you mean 'helpfulness'?",
        ),
        ("{detail: 0}", "reward.weights gives every principle 0; give at least one another weight"),
    ],
)
def test_weights_that_cannot_be_used_fail_before_any_model_is_trained(
    morlaif: Callable[..., Ended], tmp_path: Path, weights: str, message: str
) -> None:
    ended = morlaif(*small(tmp_path / "run", *setting(f"reward.weights={weights}")))
    assert ended == Ended(2, message)
    assert not (tmp_path / "run" / "work").exists()


def test_a_judge_without_its_key_is_refused_before_any_model_is_trained(
    morlaif: Callable[..., Ended], tmp_path: Path
) -> None:
    judge = "feedback.judge={kind: openai, model: gpt-4o-mini, api_key_env: NO_SUCH_KEY}"
    ended = morlaif(*small(tmp_path / "run", *setting(judge)))
    assert ended.code == 4
    assert ended.error.startswith(
        "environment variable NO_SUCH_KEY is not set; put the judge's API key there"
    )


# ---------------------------------------------------------------- the run folder


# ---------------------------------------------------------------- the cluster
