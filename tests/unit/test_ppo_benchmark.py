"""The PPO benchmark counts operations, lengths and intervals as worked out by hand, and says why a part did not run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import ppo, ppo_gpu
from benchmarks.ppo_overlap import Simulated, Update, idle_shares, report
from benchmarks.ppo_quality import compare
from benchmarks.ppo_sides import Measured, last_line
from benchmarks.ppo_workload import TINY, Size, Workload, make_workload, step_flops
from morlaif_ray.rl.generation import SamplingSettings, TransformersEngine
from morlaif_ray.types import GenerationRequest

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    folder = tmp_path_factory.mktemp("workload")
    return make_workload(folder, TINY, topology="shared_trunk", mean_response_tokens=12.0)


def test_operations_of_a_step_are_those_worked_out_by_hand(workload: Workload) -> None:
    # Width 10, 2 layers, vocabulary 100: trunk 2*12*100 = 2400 entries. Prompt 2 + 32 tokens, response 16: length 50.
    # A token: 2*2400 + 2*2*50*10 = 6800; the trunk on 64*50 tokens: 21.76M. Head: 64*16*2*100*10 = 2.048M.
    small = Workload(workload.folder, Size(10, 2, 2, 100), workload.config, None)
    counts = step_flops(small, 16.0, shared_trunk=False, separate_critic=True)
    assert counts.generate == counts.reference == pytest.approx(23.808e6)
    assert counts.value == pytest.approx(21.76e6)
    assert counts.score == pytest.approx(12 * 21.76e6)
    assert counts.update == pytest.approx(4 * 3 * (23.808e6 + 21.76e6))
    shared = step_flops(small, 16.0, shared_trunk=True, separate_critic=False)
    assert shared.score == pytest.approx(21.76e6)
    assert shared.value == 0.0
    assert shared.total == pytest.approx(2 * 23.808e6 + 21.76e6 + 12 * 23.808e6)


def test_responses_of_the_workload_vary_around_the_wanted_length(workload: Workload) -> None:
    engine = TransformersEngine.from_path(workload.folder / "0_sft" / "model")
    requests = [GenerationRequest("\n\nHuman: w1 w2\n\nAssistant:", seed) for seed in range(400)]
    lengths = engine.generate(requests, SamplingSettings(max_new_tokens=64)).response_lengths_B
    # Geometric with mean 12, cut off at 64: 11.95; standard error 11.5/20 = 0.57. The end's probability also varies a
    # little with the hidden state, most in so narrow a model.
    assert workload.expected_response_tokens() == pytest.approx(11.95, abs=0.01)
    assert float(lengths.mean()) == pytest.approx(11.95, rel=0.3)
    assert int(lengths.min()) <= 2 < 30 <= int(lengths.max())


def test_the_median_and_not_the_mean_of_the_steps_counts() -> None:
    side = Measured("x")
    for seconds in (1.0, 9.0, 2.0):
        side.add({"seconds": seconds, "phases": {"update": seconds / 2}, "response_tokens": 5})
    assert side.median_seconds == 2.0
    assert side.phase("update") == 1.0
    assert side.phase("generate") == 0.0


def test_a_part_that_cannot_run_says_why_and_leaves_null(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    nowhere = tmp_path / "nowhere"
    monkeypatch.setattr(ppo, "_size", lambda options: TINY)
    monkeypatch.setattr(
        sys, "argv", ["ppo", "--quick", "--only", "like_for_like", "--peers", str(nowhere)]
    )
    ppo.main()
    lines = capsys.readouterr().out.splitlines()
    assert (
        f"like_for_like did not run: no environment for the peer at {nowhere}; run 'make bench-peers'"
        in lines
    )
    figures = json.loads(lines[-1])
    assert set(ppo.KEYS) <= set(figures)
    assert all(figures[key] is None for key in ppo.KEYS)


def test_settings_that_this_version_lacks_are_named_and_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ppo._known({"batch_size": 8, "warp_speed": 9}) == {"batch_size": 8}
    assert capsys.readouterr().out == "this version has no policy.warp_speed; left out\n"


def test_the_learner_idles_from_an_end_to_the_next_begin(
    capsys: pytest.CaptureFixture[str],
) -> None:
    updates = [Update(*row) for row in ([0, 6, 0, 1], [7, 10, 2, 3], [10.5, 12, 4, 5])]
    shares = idle_shares(updates)
    assert shares == [0.25, 0.25]  # 1 of 4 seconds, half a second of 2
    names = ("step", "update", "wait_rollouts", "refresh", "generate", "score")
    row = {"learner_idle_share": 0.2, **{f"seconds_{name}": 4.0 for name in names}}
    assert report(Simulated([row], shares, (1.0, 0.5))) == 0.25
    said = capsys.readouterr().out
    assert "idle 25.0% (25.0% to 25.0%; the loop says 20.0%)" in said
    assert "CPU time: learner between updates 1.000 s, loop 0.500 s" in said


def test_curves_are_compared_at_equal_kl_and_disagree_where_intervals_part() -> None:
    def line(slope: float) -> list[tuple[float, float]]:
        return [(kl / 10, slope * kl / 10) for kl in range(41)]

    same = compare({"a": [line(1.0), line(1.1)], "b": [line(1.05), line(1.15)]})
    assert same["intervals_overlap"]
    apart = compare({"a": [line(1.0), line(1.001)], "b": [line(2.0), line(2.001)]})
    assert not apart["intervals_overlap"]
    low, high = apart["intervals"]["a"][2]
    assert (low + high) / 2 == pytest.approx(apart["kl"][2] * 1.0005, abs=2e-3)


def test_the_gpu_benchmark_refuses_in_one_line_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["ppo_gpu"])
    with pytest.raises(
        SystemExit,
        match=r"^error: no CUDA device here; run on a GPU, or try --device cpu --tiny for a trial$",
    ):
        ppo_gpu.main()


def test_operations_of_the_gpu_models_match_their_known_sizes() -> None:
    medium, llama = ppo_gpu.SHAPES["gpt2-medium"], ppo_gpu.SHAPES["llama-1b"]
    # gpt2-medium: 354.8M with 51.5M token and 1.0M position embeddings; TinyLlama: 1,100M with 2 x 65.5M.
    assert medium.trunk_parameters == pytest.approx(302.0e6, rel=0.01)
    assert llama.trunk_parameters == pytest.approx(968.9e6, rel=0.01)


def test_the_last_line_of_a_growing_log_is_read_alone(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(f'{{"step": {step}}}\n' for step in range(500)))
    assert last_line(log, longest=40) == b'{"step": 499}'
    log.write_text('{"step": 1}\n')
    assert last_line(log) == b'{"step": 1}'
