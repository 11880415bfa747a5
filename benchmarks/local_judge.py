"""What the `local` judge's shared prefix saves: 12 principles on one pair against one principle.

    python -m benchmarks.local_judge [--rounds 9] [--threads 1] [--engine auto|vllm|transformers]

A Llama of about 25 million untrained parameters is made on the spot; its answers mean nothing, its arithmetic is a real
judge's. Each round times, on a pair of its own of about 400 tokens, one question and then twelve; the figure is the
median of the rounds' ratios, so that other work on the machine touches both sides alike (CPU time stands beside it).
The labels of the twelve are compared with those of twelve prompts asked alone. One thread, as a worker with one CPU
has. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

PAIR_TOKENS = 400
CONVERSATION_TOKENS = 160
LABELLED_PAIRS = 4
"""Pairs whose twelve labels are compared with those of twelve separate prompts."""
RATIO_LIMIT = 2.0
MAX_LENGTH = 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--engine", choices=("auto", "vllm", "transformers"), default="auto")
    options = parser.parse_args()
    figures = measure_prefix_ratio(options.rounds, options.threads, options.engine)
    for name, value in figures.items():
        limit = f"   (limit {RATIO_LIMIT:g})" if name == "prefix_time_ratio_12_vs_1" else ""
        print(f"{name:34s} {value}{limit}")
    print(json.dumps(figures))


def measure_prefix_ratio(rounds: int = 9, threads: int = 1, engine: str = "auto") -> dict[str, Any]:
    """All figures of the module, by JSON key. Sets torch's number of threads for the time of the measurement."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "judge"
            num_parameters = make_judge(folder)
            return {"prefix_judge_parameters": num_parameters, **_measure(folder, rounds, engine)}
    finally:
        torch.set_num_threads(before)


def _measure(folder: Path, rounds: int, engine: str) -> dict[str, Any]:
    from morlaif_ray.config.judging import LocalJudge
    from morlaif_ray.feedback.judges import build_client

    judge = LocalJudge.model_validate({"model": str(folder), "engine": engine})
    client: Any = build_client(judge, seed=0)
    pairs = [_questions(client, number) for number in range(rounds + 1)]

    def timed(questions: Sequence[Any]) -> tuple[_Spent, list[Any]]:
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        answers = asyncio.run(client.ask_many(questions))
        return _Spent(time.perf_counter() - wall_s, time.process_time() - cpu_s), answers

    timed(pairs[0])  # first use of the kernels
    ones, twelves, gaps = [], [], []
    for number, questions in enumerate(pairs[1:]):
        one, _ = timed([questions[number % len(questions)]])
        twelve, together = timed(questions)
        ones.append(one)
        twelves.append(twelve)
        if number < LABELLED_PAIRS:
            alone = [timed([question])[1][0] for question in questions]
            gaps += [(_log_odds(a), _log_odds(b)) for a, b in zip(together, alone, strict=True)]
    asyncio.run(client.close())
    ratios = [twelve.wall_s / one.wall_s for one, twelve in zip(ones, twelves, strict=True)]
    cpu_ratios = [twelve.cpu_s / one.cpu_s for one, twelve in zip(ones, twelves, strict=True)]
    return {
        "prefix_engine": "transformers" if client._vllm is None else "vllm",
        "prefix_time_ratio_12_vs_1": round(statistics.median(ratios), 3),
        "prefix_time_ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "prefix_cpu_ratio_12_vs_1": round(statistics.median(cpu_ratios), 3),
        "prefix_one_s": round(statistics.median(one.wall_s for one in ones), 4),
        "prefix_twelve_s": round(statistics.median(twelve.wall_s for twelve in twelves), 4),
        "prefix_same_labels": all((a > 0.0) == (b > 0.0) for a, b in gaps),
        "prefix_max_log_odds_gap": max(abs(a - b) for a, b in gaps),
        "prefix_labels_compared": len(gaps),
        "prefix_prompt_tokens": together[0].prompt_tokens,
    }


class _Spent(NamedTuple):
    wall_s: float
    cpu_s: float


def _log_odds(answer: Any) -> float:
    from morlaif_ray.feedback.parsing import parse_answer

    return parse_answer(answer).log_odds


def make_judge(folder: Path) -> int:
    """An untrained Llama with grouped queries and a byte-level BPE tokenizer; returns its number of parameters."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    core = ByteLevelBPETokenizer()
    core.train_from_iterator(_training_text(), vocab_size=8000, special_tokens=["<eos>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core._tokenizer, eos_token="<eos>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def _training_text() -> list[str]:
    """English at hand: the principles, the template and the test-bed's words, shuffled into lines."""
    from morlaif_ray.feedback.template import DEFAULT_TEMPLATE

    draw = random.Random(0)
    words = _words()
    lines = [" ".join(draw.choices(words, k=40)) for _ in range(500)]
    principles = _principles()
    return [DEFAULT_TEMPLATE, "Answer: A", "Answer: B", *lines] + [
        text for entry in principles for text in (entry.statement, entry.question)
    ] * 5


def _principles() -> Sequence[Any]:
    from morlaif_ray.principles import load_principles

    return load_principles("all")


def _words() -> list[str]:
    from morlaif_ray.testbed import vocabulary

    return sorted(word for word in vocabulary() if word.isalpha())


def _questions(client: Any, number: int) -> list[Any]:
    """The 12 principles on one pair of about PAIR_TOKENS tokens, in one order."""
    from morlaif_ray.feedback.questions import plan_questions
    from morlaif_ray.types import ResponsePair

    draw = random.Random(number)
    words = _words()

    def text(num_tokens: int) -> str:
        found = ""
        while client.count_tokens(found) < num_tokens:
            found = f"{found} {draw.choice(words)}".strip()
        return found

    response_tokens = (PAIR_TOKENS - CONVERSATION_TOKENS) // 2
    pair = ResponsePair(
        pair_id=f"pair{number}",
        prompt_id=f"prompt{number}",
        prompt=f"\n\nHuman: {text(CONVERSATION_TOKENS)}\n\nAssistant:",
        response_a=text(response_tokens),
        response_b=text(response_tokens),
        split="test",
        human_label=float("nan"),
    )
    principles = _principles()
    plan = plan_questions(principles, orders="both", seed=0, recipe="benchmark")
    return [
        question
        for question in plan.questions(pair)
        if question.order == "ab" and question.principle != "general"
    ]


if __name__ == "__main__":
    main()
