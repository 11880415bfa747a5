"""The local judge answers from the model's own next-token distribution, and says so where it cannot."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from actors import feedback_worker
from actors.feedback_worker import worker_cpus
from morlaif_ray.backbone import load_causal_lm, load_tokenizer
from morlaif_ray.config import parse_config
from morlaif_ray.config.judging import FeedbackConfig, LocalJudge
from morlaif_ray.errors import ArtifactError, ConfigError, FeedbackError
from morlaif_ray.feedback import local_client
from morlaif_ray.feedback.client import AttemptError, Question, RawAnswer
from morlaif_ray.feedback.judges import build_client, build_feedback_client, recipe_of
from morlaif_ray.feedback.parsing import parse_answer
from morlaif_ray.feedback.prompting import count_truncated
from morlaif_ray.feedback.questions import PairBatch
from morlaif_ray.feedback.template import DEFAULT_TEMPLATE, render
from morlaif_ray.feedback.vllm_scoring import vllm_is_installed
from tests.unit.feedback.fakes import PLAN, FakeJudge, MemoryLedger, make_pairs, make_runner
from tests.unit.feedback.tiny_judges import CHAT_TEMPLATE, make_judge

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_judge(tmp_path_factory.mktemp("judge") / "plain")


def client_of(folder: Path, **changes: Any) -> Any:
    return build_client(LocalJudge(model=str(folder), **changes), seed=0)


def ask(client: Any, questions: Sequence[Question]) -> list[RawAnswer | AttemptError]:
    return asyncio.run(client.ask_many(questions))


def questions_of(count: int) -> list[Question]:
    """Pairs x 2 orders x 2 phrases."""
    return [question for pair in make_pairs(count) for question in PLAN.questions(pair)]


def long_question(turns: int, words_per_turn: int = 20, phrase: str = "Better?") -> Question:
    dialogue = "".join(
        f"\n\nHuman: turn {turn}" + " word" * words_per_turn + "\n\nAssistant: yes"
        for turn in range(turns)
    )
    prompt = dialogue + "\n\nHuman: the last message\n\nAssistant:"
    return Question(prompt, " first one", " second", "detail", phrase, "ab", b"k" * 16)


def test_the_two_letters_hold_the_probability_of_all_their_spellings(judge_folder: Path) -> None:
    question = questions_of(1)[0]
    answer = ask(client_of(judge_folder), [question])[0]
    assert isinstance(answer, RawAnswer)
    tokenizer, model = load_tokenizer(str(judge_folder)), load_causal_lm(str(judge_folder))
    ids = tokenizer(render(DEFAULT_TEMPLATE, question) + "\n\nAnswer:")["input_ids"]
    with torch.inference_mode():
        probabilities = torch.softmax(model(torch.tensor([ids])).logits[0, -1], dim=0).tolist()
    spelt = {"A": 0.0, "B": 0.0}
    spellings = 0
    for number, probability in enumerate(probabilities):
        bare = tokenizer.decode([number]).strip(" ():\n").upper()
        if bare in spelt:
            spelt[bare] += probability
            spellings += 1
    assert spellings >= 5  # "A", " A", "a", "B", "b" at least
    parsed = parse_answer(answer)
    assert parsed.log_odds == pytest.approx(math.log(spelt["A"] / spelt["B"]), abs=1e-4)
    assert parsed.mass == pytest.approx(spelt["A"] + spelt["B"], abs=1e-6)
    assert (answer.prompt_tokens, answer.completion_tokens) == (len(ids), 0)
    assert answer.model.startswith("plain@")


def test_a_question_has_one_answer_whatever_it_is_asked_with(judge_folder: Path) -> None:
    client = client_of(judge_folder, batch_size=5)
    questions = questions_of(4)
    together = [parse_answer(answer).log_odds for answer in ask(client, questions)]  # type: ignore[arg-type]
    alone = [parse_answer(ask(client, [question])[0]).log_odds for question in questions]  # type: ignore[arg-type]
    assert together == pytest.approx(alone, abs=1e-4)
    assert len({round(value, 3) for value in alone}) > 8


def test_a_chat_template_is_used_where_the_tokenizer_has_one(tmp_path: Path) -> None:
    folder = make_judge(tmp_path / "chat", chat_template=CHAT_TEMPLATE)
    question = questions_of(1)[0]
    answer = ask(client_of(folder), [question])[0]
    assert isinstance(answer, RawAnswer)
    tokenizer, model = load_tokenizer(str(folder)), load_causal_lm(str(folder))
    text = f"<|user|>{render(DEFAULT_TEMPLATE, question)}<eos><|assistant|>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert answer.prompt_tokens == len(ids)
    with torch.inference_mode():
        logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], dim=0)
    a_ids = [i for i in range(len(tokenizer)) if tokenizer.decode([i]).strip(" ()").upper() == "A"]
    assert answer.top_logprobs["A"] == pytest.approx(logprobs[a_ids].logsumexp(0).item(), abs=1e-4)


def test_a_long_pair_loses_its_oldest_turns_alike_for_every_phrase(judge_folder: Path) -> None:
    client = client_of(judge_folder, max_length=500)
    short = long_question(0)
    long = [long_question(40, phrase=phrase) for phrase in ("Better?", "Which one is kinder?")]
    encoded = client._encode_all([short, *long])
    assert client.num_truncated == 2
    tokenizer = load_tokenizer(str(judge_folder))
    texts = [tokenizer.decode(ids) for ids in encoded]
    assert all(len(ids) <= 500 for ids in encoded)
    assert all("the last message" in text and "second" in text for text in texts)
    assert "turn 39" in texts[1]
    assert "turn 0 " not in texts[1]
    assert texts[1].partition("Better?")[0] == texts[2].partition("Which one")[0]


def test_a_last_message_that_alone_is_too_long_fails_with_its_reason(judge_folder: Path) -> None:
    client = client_of(judge_folder, max_length=400)
    hopeless = dataclasses.replace(long_question(0), prompt="\n\nHuman:" + " word" * 400)
    answers = ask(client, [hopeless, long_question(0)])
    assert isinstance(answers[0], AttemptError)
    assert "too long for the local judge (400 tokens)" in answers[0].message
    assert isinstance(answers[1], RawAnswer)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "/no/such/folder"}, FeedbackError, "is not a folder"),
        ({"max_length": 4096}, ConfigError, "reads at most 1024 tokens; write 1024 or less"),
    ],
)
def test_a_wrong_judge_ends_in_one_line(
    judge_folder: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    judge = LocalJudge.model_validate({"kind": "local", "model": str(judge_folder), **changes})
    with pytest.raises(error, match=message):
        build_client(judge, seed=0)


def test_a_folder_without_weights_is_named_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FeedbackError, match=r"holds no config\.json with"):
        recipe_of(LocalJudge(model=str(tmp_path)), 0)


def test_a_folder_without_a_tokenizer_is_refused(judge_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(judge_folder, folder, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    with pytest.raises(ArtifactError, match="tokenizer is missing"):
        client_of(folder)


def test_a_vocabulary_without_the_letters_cannot_judge(tmp_path: Path) -> None:
    from morlaif_ray.backbone import build_word_tokenizer
    from tests.unit.feedback.tiny_judges import tiny_model

    tokenizer = build_word_tokenizer(["only words here"], vocabulary_size=9, max_length=64)
    tiny_model("llama", vocabulary=len(tokenizer)).save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    with pytest.raises(FeedbackError, match="no token for the letter A"):
        client_of(tmp_path / "judge")


def test_a_tokenizer_that_is_not_the_models_is_refused(judge_folder: Path, tmp_path: Path) -> None:
    from tests.unit.feedback.tiny_judges import tiny_model

    folder = tmp_path / "mixed"
    shutil.copytree(judge_folder, folder)
    tiny_model("llama", vocabulary=50).save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"its tokenizer has \d+ tokens, the model 50"):
        client_of(folder)


def test_a_moved_folder_is_the_same_judge_and_new_weights_are_another(
    judge_folder: Path, tmp_path: Path
) -> None:
    def recipe(folder: Path, **changes: Any) -> str:
        return recipe_of(LocalJudge(model=str(folder), **changes), 0)

    moved = Path(shutil.copytree(judge_folder, tmp_path / "elsewhere" / "plain"))
    before = recipe(judge_folder)
    assert recipe(moved) == before
    assert recipe(moved, batch_size=3) == before  # how the work is cut is no part of the answer
    assert recipe(moved, dtype="bfloat16") != before
    with (moved / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x3c")
    assert recipe(moved) != before


class ManyJudge(FakeJudge):
    """Answers call by call; the last pair's questions cannot be asked."""

    questions_per_call = 3

    def __init__(self, hopeless: str) -> None:
        super().__init__()
        self.calls: list[list[Question]] = []
        self._hopeless = hopeless

    async def ask_many(self, questions: Sequence[Question]) -> list[RawAnswer | AttemptError]:
        self.calls.append(list(questions))
        too_long = AttemptError("bad_request", "too long")
        return [
            too_long if question.prompt == self._hopeless else await self.ask(question)
            for question in questions
        ]


def test_calls_end_between_groups_and_every_question_ends_once() -> None:
    pairs = make_pairs(4)
    judge, ledger = ManyJudge(hopeless=pairs[3].prompt), MemoryLedger()
    runner = make_runner(judge, ledger)
    outcome = asyncio.run(runner.run(PairBatch(0, tuple(pairs))))
    # 4 pairs x 2 orders x 2 phrases: a call of 3 takes the 4th, which shares its prompt.
    assert [len(call) for call in judge.calls] == [4, 4, 4, 4]
    assert len(ledger.rows) == 12
    assert len(ledger.failures) == 4
    assert outcome.failed_N.tolist() == [False] * 12 + [True] * 4
    assert "too long" in outcome.reasons[12]


def test_recorded_answers_are_not_asked_of_it_again() -> None:
    pairs = tuple(make_pairs(3))
    ledger = MemoryLedger()
    asyncio.run(make_runner(ManyJudge(""), ledger).run(PairBatch(0, pairs[:2])))
    judge = ManyJudge("")
    asyncio.run(make_runner(judge, ledger).run(PairBatch(0, pairs)))
    assert [question.prompt for question in judge.asked] == [pairs[2].prompt] * 4


def test_the_driver_counts_the_pairs_that_the_judge_will_see_cut(judge_folder: Path) -> None:
    judge = LocalJudge(model=str(judge_folder), max_length=600)
    feedback = FeedbackConfig(judge=judge)
    question = long_question(40)
    pairs = [
        *make_pairs(3),
        dataclasses.replace(make_pairs(1)[0], prompt=question.prompt, pair_id="long"),
    ]
    assert count_truncated(feedback, pairs) == 1
    client: Any = build_feedback_client(feedback, seed=0)
    (answer,) = ask(client, [question])
    assert isinstance(answer, RawAnswer)
    assert answer.prompt_tokens <= 600
    assert client.num_truncated == 0  # the prompter's cut was enough


@pytest.mark.skipif(vllm_is_installed(), reason="vLLM is installed here: see tests/vllm")
def test_without_vllm_auto_means_transformers_and_vllm_is_one_line(judge_folder: Path) -> None:
    assert client_of(judge_folder, engine="auto")._vllm is None
    with pytest.raises(
        ConfigError, match=r"engine is vllm but vLLM is not installed.*transformers"
    ):
        client_of(judge_folder, engine="vllm")


@pytest.mark.parametrize(
    ("changes", "slices"),
    [({}, 1), ({"gpus_per_worker": 0.5}, 1), ({"gpus_per_worker": 4}, 4)],
)
def test_a_judge_has_a_slice_per_gpu(changes: dict[str, Any], slices: int) -> None:
    judge = LocalJudge(model="judge", **changes)
    assert judge.slices == slices
    assert worker_cpus(FeedbackConfig(judge=judge)) == slices


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpus_per_worker": 2.5}, r"2\.5 is neither a part of a GPU nor a whole number; write 3"),
        ({"gpus_per_worker": 2, "engine": "transformers"}, "2 slices are asked for; write engine"),
        ({"gpus_per_worker": 2, "tensor_parallel_size": 4}, "is 4, and gpus_per_worker 2; leave"),
    ],
)
def test_slices_without_a_gpu_each_are_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({"feedback": {"judge": {"kind": "local", "model": "m", **changes}}}, "x")


def test_slices_without_vllm_are_one_line(
    judge_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_client, "vllm_is_installed", lambda: False)
    with pytest.raises(ConfigError, match="only vLLM slices a model over 2 processes"):
        client_of(judge_folder, tensor_parallel_size=2)


def test_a_worker_whose_judge_lost_a_process_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []

    class Sliced(FakeJudge):
        def when_lost(self, act: Callable[[], None]) -> None:
            act()

    monkeypatch.setattr(feedback_worker, "build_feedback_client", lambda *_, **__: Sliced())
    monkeypatch.setattr(feedback_worker.os, "_exit", codes.append)
    worker = feedback_worker.FeedbackWorker(FeedbackConfig(), PLAN, 0, MemoryLedger(), None)
    asyncio.run(worker.start())
    assert codes == [1]
