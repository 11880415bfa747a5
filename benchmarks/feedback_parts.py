"""What the parts of `benchmarks.feedback` share: questions, servers, pools, processes, and the bare client."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import random
import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psutil

from morlaif_ray.config.judging import FeedbackConfig
from morlaif_ray.feedback.judges import recipe_for
from morlaif_ray.feedback.prompting import prompter_for
from morlaif_ray.feedback.questions import PairBatch, QuestionPlan, plan_questions, split_batches
from morlaif_ray.principles import load_principles
from morlaif_ray.types import ResponsePair

KEY_ENV = "MORLAIF_BENCHMARK_KEY"
ROOT = Path(__file__).parents[1]
RESPONSE_WORDS = 60
PROMPT_WORDS = 120
"""A question is then some 400 tokens long, template included."""
_WORDS = (
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "you",
    "that",
    "it",
    "he",
    "was",
    "for",
    "on",
    "are",
)


def load_server() -> Any:
    """`tests/fake_openai/faulty.py`; `tests` is no package (STYLE.md), so it is loaded by its path."""
    name = "faulty_openai_server"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "tests/fake_openai/faulty.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def make_pairs(count: int) -> list[ResponsePair]:
    """Different texts by number alone."""

    def words(draw: random.Random, number: int) -> str:
        return " ".join(draw.choices(_WORDS, k=number))

    pairs = []
    for i in range(count):
        draw = random.Random(i)
        prompt = f"\n\nHuman: {i} {words(draw, PROMPT_WORDS)}\n\nAssistant:"
        first, second = (f" {j} {words(draw, RESPONSE_WORDS)}." for j in range(2))
        pairs.append(ResponsePair(f"pair{i}", f"prompt{i}", prompt, first, second, "test", 1.0))
    return pairs


def make_config(server_url: str, folder: Path, **changes: Any) -> FeedbackConfig:
    """A feedback section for the faulty server, whose price stands in a file of its own."""
    prices = folder / "prices.yaml"
    prices.write_text("as_of: 2026-11-21\nmodels:\n  faulty: {prompt: 0.15, completion: 0.60}\n")
    judge = {"kind": "openai", "model": "faulty", "base_url": server_url, "api_key_env": KEY_ENV}
    judge |= changes.pop("judge", {})
    return FeedbackConfig.model_validate({"judge": judge, "prices_file": prices} | changes)


def make_plan(feedback: FeedbackConfig) -> QuestionPlan:
    """All shipped principles and the overall question, in both orders: 26 questions per pair."""
    principles = load_principles("all", None)
    return plan_questions(principles, orders="both", seed=0, recipe=recipe_for(feedback, 0))


def make_batches(plan: QuestionPlan, questions: int, per_batch: int = 2048) -> list[PairBatch]:
    pairs = make_pairs(-(-questions // plan.per_pair))
    return list(split_batches(pairs, plan, per_batch))


@contextmanager
def local_ray(num_cpus: int = 16) -> Iterator[None]:
    """CPUs are a number for Ray here: the workers mostly wait."""
    from actors.session import prepare_environment

    os.environ["PYTHONPATH"] = str(ROOT)
    prepare_environment()
    os.environ.setdefault("RAY_AUTH_TOKEN", "0123456789abcdef" * 4)
    import ray

    folder = tempfile.mkdtemp(prefix="bf-", dir="/tmp")
    ray.init(
        num_cpus=num_cpus,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=200 * 1024**2,
        _temp_dir=folder,
        logging_level="ERROR",
    )
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def make_pool(feedback: FeedbackConfig, plan: QuestionPlan, ledger: Path) -> Any:
    from actors.feedback_pool import FeedbackPool
    from actors.ledger_writer import LedgerRecipe

    recipe = LedgerRecipe(plan.recipe, "{}", prompter_for(feedback).describe())
    return FeedbackPool(feedback, plan, ledger, recipe, seed=0, start_timeout_s=180.0)


OURS = ("ray::FeedbackWo", "ray::LedgerWrit", "ray::RateLimite")
SYSTEM = ("raylet", "gcs_server")


def our_processes() -> list[psutil.Process]:
    """This process and the feedback actors that it started."""
    me = psutil.Process()
    found = [child for child in me.children(recursive=True) if _name(child).startswith(OURS)]
    return [me, *found]


def system_processes() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if _name(p).startswith(SYSTEM)]


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.Error:
        return ""


def cpu_s(processes: Sequence[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def resident_mb(processes: Sequence[psutil.Process]) -> float:
    """Memory of their own (USS): pages shared with others are not counted."""
    return sum(float(process.memory_full_info().uss) for process in processes) / 1e6


def rows_of(ledger: Path) -> int:
    """Answers in the ledger, read beside its writer; 0 while there is none."""
    if not ledger.exists():
        return 0
    try:
        with closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True, timeout=10)) as db:
            return int(db.execute("SELECT answers FROM totals").fetchone()[0])
    except (sqlite3.Error, TypeError):
        return 0


# ---------------------------------------------------------------- the bare client


def bare_client(url: str, questions: int, in_flight: int) -> None:
    """Sends the same requests with `openai` alone; prints {"cpu_s", "wall_s"} of the sending."""
    import openai

    with tempfile.TemporaryDirectory() as scratch:
        feedback = make_config(url, Path(scratch))
        plan, prompter = make_plan(feedback), prompter_for(feedback)
        asked = [q for batch in make_batches(plan, questions) for q in plan.batch_questions(batch)]
        prompts = [prompter.messages(question) for question in asked[:questions]]
    client = openai.AsyncOpenAI(api_key=os.environ[KEY_ENV], base_url=url, max_retries=0)

    async def work(queue: Iterator[Any]) -> None:
        for messages in queue:
            await client.chat.completions.create(
                model="faulty",
                messages=messages,
                max_tokens=1,
                temperature=0.0,
                logprobs=True,
                top_logprobs=20,
            )

    async def all_of_it() -> None:
        queue = iter(prompts)
        await asyncio.gather(*(work(queue) for _ in range(in_flight)))

    cpu, wall = time.process_time(), time.monotonic()
    asyncio.run(all_of_it())
    print(json.dumps({"cpu_s": time.process_time() - cpu, "wall_s": time.monotonic() - wall}))
