"""The command itself: fast help, plain words, nothing heavy before it is needed."""

from __future__ import annotations

import io
import subprocess
import sys
import time

import pytest
from rich.console import Console

from jobs.cli import JOBS, main
from jobs.progress import Reporter
from tests.jobs.commands import ROOT, clean_environment

pytestmark = pytest.mark.jobs
LOADED = """
import sys
from jobs.cli import main
try:
    main(["--help"])
except SystemExit as end:
    assert end.code == 0
heavy = {"ray", "torch", "transformers", "numpy", "pyarrow", "rich"} & set(sys.modules)
sys.exit(f"loaded: {sorted(heavy)}" if heavy else 0)
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_help_comes_within_a_second_and_names_every_job() -> None:
    seconds = []
    for _ in range(3):  # the fastest: other work on this machine is not ours
        started = time.monotonic()
        done = python("-m", "jobs", "--help")
        seconds.append(time.monotonic() - started)
        assert done.returncode == 0
    assert min(seconds) < 1.0
    for job in JOBS:
        assert f"\n    {job}" in done.stdout


def test_help_loads_neither_ray_nor_torch() -> None:
    done = python("-c", LOADED)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("job", list(JOBS))
def test_every_job_explains_itself_with_an_example(
    job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([job, "--help"])
    assert caught.value.code == 0
    assert f"morlaif {job} --config configs/demo.yaml" in capsys.readouterr().out


def test_an_unknown_job_gets_the_nearest_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train_polciy"]) == 2
    assert capsys.readouterr().err == "error: no job 'train_polciy'; did you mean 'train_policy'?\n"
    assert main(["brew"]) == 2
    assert capsys.readouterr().err.startswith("error: no job 'brew'; jobs: demo, run, plan, ")


def test_a_job_without_a_config_says_which_option_to_give(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["run"]) == 2
    assert capsys.readouterr().err == (
        "error: morlaif run: give --config FILE, e.g. --config configs/demo.yaml\n"
    )


def test_no_argument_at_all_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "usage: morlaif" in capsys.readouterr().err


# ---------------------------------------------------------------- what a person sees meanwhile


def test_without_a_terminal_a_task_is_one_line_at_its_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    reporter = Reporter(stream_is_terminal=False)
    with reporter.task("feedback", total=3, unit="judgements") as task:
        for _ in range(3):
            task.advance()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "  feedback: 3 judgements in 0." in lines[0]
    assert "\x1b" not in lines[0]


def test_a_long_task_without_a_terminal_says_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.progress.PLAIN_INTERVAL_S", 0.0)
    with Reporter(stream_is_terminal=False).task("PPO", total=8, unit="steps") as task:
        task.note("linear: reward +0.50")
        task.advance(2)
        task.advance(-2)  # a learner went back to its checkpoint
    shown = capsys.readouterr().err.splitlines()
    assert "PPO: 2/8 steps, " in shown[0]
    assert shown[0].endswith(" s left (linear: reward +0.50)")
    assert "PPO: 0/8 steps, 0.0/s (linear: reward +0.50)" in shown[1]


def test_a_quiet_reporter_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(quiet=True)
    reporter.line("one")
    reporter.result("/path/report.html")
    with reporter.task("two", total=1) as task:
        task.advance()
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_a_task_is_a_bar_that_gives_way_to_one_line() -> None:
    reporter = Reporter(stream_is_terminal=True)
    stream = io.StringIO()
    reporter._console = Console(file=stream, force_terminal=True, width=100)
    with reporter.task("scores", total=4, unit="texts") as task:
        task.advance(4)
    assert "4/4" in stream.getvalue()
    assert "scores: 4 texts in 0." in stream.getvalue().splitlines()[-1]
