"""The command `morlaif`. Parses and checks everything first; heavy modules are imported by the job that needs them."""

from __future__ import annotations

import argparse
import difflib
import importlib
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from morlaif_ray import __version__
from morlaif_ray.errors import ConfigError, MorlaifError

# Verb -> (module, one-line help). The order is the order of the method.
JOBS: dict[str, tuple[str, str]] = {
    "demo": ("jobs.run_all", "the whole method on a laptop: no key, no network, no GPU"),
    "run": ("jobs.run_all", "all stages of a config, resuming where the last run ended"),
    "plan": ("jobs.plan", "print stages, actors, memory, judgements and cost; run nothing"),
    "doctor": ("jobs.doctor", "check this machine and say what is missing"),
    "train_sft": ("jobs.train_sft", "stage 0: fine-tune the target model on dialogues"),
    "sample_pairs": ("jobs.sample_pairs", "stage 1: two responses per prompt"),
    "collect_feedback": (
        "jobs.collect_feedback",
        "stage 2: ask the judge, per principle, in both orders",
    ),
    "train_preference_models": (
        "jobs.train_preference_models",
        "stage 3: one PM per principle, and baselines",
    ),
    "fit_weights": ("jobs.fit_weights", "stage 4: weights, scalarizers, ceiling, ablation"),
    "sweep": ("jobs.sweep_scalarizers", "stage 4: sweep scalarizers and weights with Ray Tune"),
    "train_policy": ("jobs.train_policy", "stage 5: PPO for every arm"),
    "evaluate": ("jobs.evaluate", "stage 6: win rates, scores, report"),
    "evaluate_preference": (
        "jobs.evaluate_preference",
        "accuracy of a run's PMs and rewards on RewardBench's format, by subset",
    ),
    "report": ("jobs.report", "rebuild the report of a finished run"),
}
# Not a job: it reads a run folder and starts nothing.
TOOLS = {"feedback": "how a collection of feedback stands: `morlaif feedback status --run-dir DIR`"}
ALIASES = {"sweep_scalarizers": "sweep", "run_all": "run"}

EXAMPLES = """examples:
  morlaif demo                                         the whole method in minutes; opens with runs/demo/report.html
  morlaif run --config configs/hh_small.yaml --set data.source.paths=[hh.jsonl.gz]
  morlaif run --config configs/demo.yaml --set policy.num_steps=20 --run-dir runs/quick
  morlaif plan --config configs/llama2_7b.yaml         what it needs and costs
  ray job submit --working-dir . -- python -m jobs run --config configs/demo.yaml

Ctrl-C, then the same command: it goes on where it stopped."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="morlaif",
        description="From principles in plain English to an aligned language model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"morlaif {__version__}")
    verbs = parser.add_subparsers(dest="job", metavar="JOB", required=True)
    for verb, (_, text) in JOBS.items():
        _add_options(
            verbs.add_parser(verb, help=text, description=text[0].upper() + text[1:] + "."), verb
        )
    feedback = verbs.add_parser("feedback", help=TOOLS["feedback"], description=TOOLS["feedback"])
    questions = feedback.add_subparsers(dest="question", metavar="QUESTION", required=True)
    status = questions.add_parser(
        "status", help="done, left, failed, spent, rate, time left, bias, agreement, errors"
    )
    status.add_argument(
        "--run-dir", type=Path, metavar="DIR", required=True, help="the run's folder"
    )
    return parser


def _add_options(parser: argparse.ArgumentParser, verb: str) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        f"example:\n  morlaif {verb} --config configs/demo.yaml --set seed=1 --run-dir runs/seed1"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML config (see configs/)")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="A.B=C",
        help="override one value; repeatable",
    )
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="default: runs/<config name>")
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    parser.add_argument(
        "--accept-config-change",
        action="store_true",
        help="the run folder holds another config: redo the stages that differ",
    )
    if verb == "evaluate_preference":
        parser.add_argument(
            "--data",
            metavar="DATA",
            required=True,
            help=".jsonl or .parquet file with chosen, rejected and subset, or a hub id",
        )
        parser.add_argument(
            "--split",
            metavar="NAME",
            default="filtered",
            help="of a hub data set (default: filtered)",
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one job; returns the exit code and prints a one-line cause where it is not 0."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and not words[0].startswith("-"):
        words[0] = ALIASES.get(words[0].replace("-", "_"), words[0].replace("-", "_"))
        known = [*JOBS, *TOOLS]
        if words[0] not in known:
            close = difflib.get_close_matches(words[0], known, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"jobs: {', '.join(known)}"
            print(f"error: no job '{words[0]}'; {hint}", file=sys.stderr)
            return 2
    options = build_parser().parse_args(words)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _run(options)
    except MorlaifError as error:
        print(f"error: {' '.join(error.message.split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130


def _interrupt(number: int, frame: FrameType | None) -> None:
    """SIGTERM (pre-emption, `ray job stop`) ends a job as Ctrl-C does."""
    raise KeyboardInterrupt


def _run(options: argparse.Namespace) -> int:
    if options.job == "feedback":
        from jobs.feedback_status import status_lines

        print("\n".join(status_lines(options.run_dir)))
        return 0
    from jobs.context import open_run
    from jobs.progress import Reporter
    from morlaif_ray.artifacts import explain_os_errors
    from morlaif_ray.config import load_config

    config_path = options.config
    if options.job == "demo" and config_path is None:
        config_path = shipped_config("demo.yaml")
    of_a_run = options.job in ("report", "evaluate_preference")
    if config_path is None and options.job != "doctor" and not of_a_run:
        raise ConfigError(
            f"morlaif {options.job}: give --config FILE, e.g. --config configs/demo.yaml"
        )
    if config_path is None and of_a_run and options.run_dir is not None:
        config_path = options.run_dir / "config.yaml"
    config = load_config(config_path, options.overrides)
    reporter = Reporter(quiet=options.quiet)
    run_dir = options.run_dir or Path("runs") / config.name
    reporter.line(
        f"morlaif {options.job}: config {config_path or 'defaults'}, run folder {run_dir}"
    )
    if options.job in ("plan", "doctor"):
        from jobs.context import JobContext

        context = JobContext(config=config, run_dir=run_dir.absolute(), reporter=reporter)
    else:
        context = open_run(
            config, run_dir, reporter, accept_config_change=options.accept_config_change
        )
    from actors.session import prepare_environment

    prepare_environment()
    with explain_os_errors(run_dir):  # a full disk shows itself anywhere
        more = (options.data, options.split) if options.job == "evaluate_preference" else ()
        importlib.import_module(JOBS[options.job][0]).run(context, *more)
    return 0


def shipped_config(name: str) -> Path:
    """A config that travels with the installed package."""
    import configs

    return Path(configs.__file__).parent / name
