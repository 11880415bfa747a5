"""The `local` judge sliced over two processes: the answers of one, and no process that outlives another."""

from __future__ import annotations

import asyncio
import importlib.util
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from morlaif_ray.config.judging import LocalJudge
from morlaif_ray.feedback.judges import build_client
from morlaif_ray.feedback.parsing import parse_answer
from tests.processes import WAIT_S, wait_until_gone
from tests.unit.feedback.fakes import PLAN, make_pairs
from tests.vllm.tiny_models import make_judge

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


def test_a_sliced_judge_answers_as_a_whole_one_and_says_when_a_slice_died(tmp_path: Path) -> None:
    folder = make_judge(tmp_path / "judge")
    sliced: Any = build_client(LocalJudge(model=str(folder), tensor_parallel_size=2), seed=0)
    whole: Any = build_client(LocalJudge(model=str(folder), engine="transformers"), seed=0)
    lost = threading.Event()
    sliced.when_lost(lost.set)
    questions = [question for pair in make_pairs(6) for question in PLAN.questions(pair)]
    found, expected = (
        [parse_answer(answer) for answer in asyncio.run(client.ask_many(questions))]
        for client in (sliced, whole)
    )
    assert len({round(answer.log_odds, 3) for answer in found}) > 8
    assert [a.log_odds for a in found] == pytest.approx([a.log_odds for a in expected], abs=1e-3)
    assert [a.mass for a in found] == pytest.approx([a.mass for a in expected], abs=1e-3)

    children = psutil.Process().children(recursive=True)
    slices = [child for child in children if "VLLM::" in " ".join(child.cmdline())]
    assert len(slices) == 2
    assert not lost.is_set()
    slices[0].kill()
    assert lost.wait(WAIT_S)
    for process in slices:
        wait_until_gone(process.pid)
