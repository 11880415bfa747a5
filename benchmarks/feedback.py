"""AI feedback under load: rate use, client cost, memory, ledger, resume, prefix reuse, and a run full of faults.

    python -m benchmarks.feedback [--quick] [--only rate,cpu,memory,ledger,faults,prefix] [sizes ...]

All servers are on loopback and processes of their own. Last line: one JSON object of all figures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from benchmarks.feedback_faults import DRIVER_KILLS, WORKERS, measure_faults, run_driver
from benchmarks.feedback_parts import (
    KEY_ENV,
    bare_client,
    cpu_s,
    load_server,
    local_ray,
    make_batches,
    make_config,
    make_pairs,
    make_plan,
    make_pool,
    our_processes,
    resident_mb,
    system_processes,
)
from morlaif_ray.errors import FeedbackError

LIMITS = {
    "rate_utilisation": "at least 0.98",
    "rejected_429_fraction": "at most 0.001",
    "cpu_ratio_vs_bare_client": "at most 1.3",
    "memory_growth_mb": "at most 50",
    "ledger_rows_per_s": "at least 20000",
    "resume_1m_rows_s": "at most 5",
    "prefix_time_ratio_12_vs_1": "at most 2",
    "faults_lost": "0",
    "faults_doubled": "0",
    "faults_mislabelled": "0",
}
REQUESTS_PER_MINUTE = 6000.0


def main() -> None:
    options = parse()
    os.environ[KEY_ENV] = load_server().KEY
    if options.bare or options.driver:
        load_server().end_with_stdin()
    if options.bare:
        bare_client(options.bare, options.cpu_questions, options.in_flight)
        return
    if options.driver:
        run_driver(json.loads(options.driver))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # scratch folders go, too
    parts: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
        "rate": measure_rate,
        "cpu": measure_cpu,
        "memory": measure_memory,
        "ledger": measure_ledger,
        "faults": measure_faults,
        "prefix": measure_prefix,
    }
    figures: dict[str, Any] = {}
    for name in options.only.split(","):
        with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
            started_s = time.monotonic()
            figures |= parts[name](options, Path(scratch))
            print(f"-- {name}: {time.monotonic() - started_s:.0f} s", flush=True)
            print(json.dumps(figures), flush=True)
    figures["machine"] = (
        f"{os.cpu_count()} CPUs, {platform.machine()}, Python {platform.python_version()}, "
        f"load {os.getloadavg()[0]:.1f}"
    )
    if options.quick:
        figures["quick"] = True
        print("quick run: sizes too small to hold against any limit; it shows that all parts work")
    limits = {} if options.quick else LIMITS
    for name, value in figures.items():
        print(f"{name:34s} {value}" + (f"   ({limits[name]})" if name in limits else ""))
    print(json.dumps(figures))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small sizes, about two minutes; figures that no limit is held against",
    )
    parser.add_argument("--only", default="rate,cpu,memory,ledger,faults,prefix")
    sizes = {
        "--rate-seconds": (60, 5),
        "--rate-seconds-short": (20, 3),
        "--cpu-questions": (12_000, 1_000),
        "--in-flight": (64, 64),
        "--memory-questions": (500_000, 12_000),
        "--ledger-rows": (1_000_000, 20_000),
        "--fault-questions": (50_000, 1_000),
    }
    quick = "--quick" in sys.argv
    for flag, (full, small) in sizes.items():
        parser.add_argument(flag, type=int, default=small if quick else full)
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    parser.add_argument("--driver", help=argparse.SUPPRESS)
    parser.add_argument("--prefix-rounds", type=int, default=2 if quick else 9)
    options = parser.parse_args()
    # A quick run still has all four sizes of the pool, one killed driver and one killed worker.
    options.driver_kills = DRIVER_KILLS[:1] if options.quick else DRIVER_KILLS
    options.worker_kills = 1 if options.quick else WORKERS
    return options


# ---------------------------------------------------------------- rate


def measure_rate(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Arrivals in the first T seconds against what the limit allows; 4 workers for long, 1, 2 and 8 for short."""
    figures: dict[str, Any] = {}
    with local_ray():
        for workers in (4, 1, 2, 8):
            seconds = options.rate_seconds if workers == 4 else options.rate_seconds_short
            use, rejected, requests = _rate_of(workers, seconds, scratch)
            suffix = "" if workers == 4 else f"_{workers}_workers"
            figures[f"rate_utilisation{suffix}"] = round(use, 4)
            figures[f"rejected_429_fraction{suffix}"] = round(rejected / requests, 5)
            figures[f"rate_window_s{suffix}"] = seconds
    return figures


def _rate_of(workers: int, seconds: int, scratch: Path) -> tuple[float, int, int]:
    """(share of the allowed requests that were answered, answers 429, requests)."""
    server = load_server()
    per_s = REQUESTS_PER_MINUTE / 60.0
    settings = server.ServerOptions(
        requests_per_minute=REQUESTS_PER_MINUTE, send_headers=True, delay_s=0.1
    )
    with server.FaultyServer(settings) as provider:
        feedback = make_config(
            provider.url,
            scratch,
            num_workers=workers,
            requests_per_minute=REQUESTS_PER_MINUTE,
            max_in_flight=64,
        )
        plan = make_plan(feedback)
        batches = make_batches(plan, int(per_s * (seconds + 1)), per_batch=208)
        with make_pool(feedback, plan, scratch / f"rate{workers}.sqlite") as pool:
            pool.answer(batches)
        stats = provider.stats()
    first_s = stats["arrivals_s"][0]
    within = sum(arrival - first_s < seconds for arrival in stats["arrivals_s"])
    return within / (per_s * seconds), stats["rejected_429"], stats["requests"]


# ---------------------------------------------------------------- CPU per judgement


def measure_cpu(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """CPU of driver, worker, ledger and limiter per judgement, over the bare client's before and after."""
    server, count = load_server(), options.cpu_questions
    with server.FaultyServer(server.ServerOptions()) as provider:
        bare = [_bare(provider.url, options)]
        feedback = make_config(
            provider.url, scratch, num_workers=1, max_in_flight=options.in_flight
        )
        plan = make_plan(feedback)
        batches = make_batches(plan, count)
        with local_ray(), make_pool(feedback, plan, scratch / "cpu.sqlite") as pool:
            pool.wait_until_started()
            ours, system = our_processes(), system_processes()
            before, system_before, wall_s = cpu_s(ours), cpu_s(system), time.monotonic()
            outcomes = pool.answer(batches)
            wall_s = time.monotonic() - wall_s
            used, system_used = cpu_s(ours) - before, cpu_s(system) - system_before
        bare.append(_bare(provider.url, options))
    asked = sum(len(outcome.log_odds_N) for outcome in outcomes)
    each_ms, bare_ms = used / asked * 1000, sum(bare) / len(bare) / count * 1000
    return {
        "cpu_ratio_vs_bare_client": round(each_ms / bare_ms, 3),
        "cpu_ms_per_judgement": round(each_ms, 3),
        "cpu_ms_per_request_bare_client": round(bare_ms, 3),
        "cpu_ms_per_judgement_ray_system": round(system_used / asked * 1000, 3),
        "judgements_per_s_one_worker": round(asked / wall_s, 1),
    }


def _bare(url: str, options: argparse.Namespace) -> float:
    command = [sys.executable, "-m", "benchmarks.feedback", "--bare", url]
    command += [
        f"--cpu-questions={options.cpu_questions}",
        f"--in-flight={options.in_flight}",
    ]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as bare:
        assert bare.stdout is not None
        printed = bare.stdout.read()
    assert bare.returncode == 0, bare.returncode
    return float(json.loads(printed.strip().splitlines()[-1])["cpu_s"])


# ---------------------------------------------------------------- memory


def measure_memory(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Own memory of driver, worker, ledger and limiter after 10,000 judgements and after all of them.

    The embedded judge answers (a provider would take an hour); pairs are loaded before. Assembling is included.
    """
    from morlaif_ray.config.judging import FeedbackConfig
    from morlaif_ray.feedback.assembling import assemble
    from morlaif_ray.feedback.combining import CombineRule

    feedback = FeedbackConfig.model_validate({"judge": {"kind": "rules", "measures": "lexical"}})
    plan = make_plan(feedback)
    batches = make_batches(plan, options.memory_questions)
    samples: list[tuple[int, float]] = []
    done = 0
    with local_ray(), make_pool(feedback, plan, scratch / "memory.sqlite") as pool:
        pool.wait_until_started()
        processes = our_processes()

        def progress(count: int) -> None:
            nonlocal done
            done += count
            since = done - samples[-1][0] if samples else done - 10_000
            if since >= (options.memory_questions / 50 if samples else 0):
                samples.append((done, resident_mb(processes)))

        started_s = time.monotonic()
        outcomes = pool.answer(batches, progress)
        seconds = time.monotonic() - started_s
        assembled = assemble(plan, batches, outcomes, CombineRule(0.05, 0.5), {})
        samples.append((done, resident_mb(processes)))
    peak = max(memory for _, memory in samples)
    return {
        "memory_growth_mb": round(peak - samples[0][1], 1),
        "memory_at_first_sample_mb": round(samples[0][1], 1),
        "memory_first_sample_judgements": samples[0][0],
        "memory_judgements": done,
        "memory_combined_judgements": len(assembled.judgements),
        "embedded_judgements_per_s": round(done / seconds, 1),
    }


# ---------------------------------------------------------------- ledger


def measure_ledger(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Rows per second of one writer with full syncs; seconds from start to the first request of a resumed run."""
    from morlaif_ray.feedback.ledger import Ledger, LedgerRow

    server = load_server()
    path = scratch / "ledger.sqlite"
    with server.FaultyServer(server.ServerOptions()) as provider:
        feedback = make_config(provider.url, scratch, num_workers=2)
        plan = make_plan(feedback)
        recorded = make_batches(plan, options.ledger_rows)
        fresh = make_pairs(sum(len(batch.pairs) for batch in recorded) + 40)[-40:]
        last = type(recorded[0])(len(recorded), tuple(fresh))
        top = json.dumps({f"token{i}": -1.2345678 * i for i in range(20)})
        ledger = Ledger(path)
        ledger.register(plan.recipe, "{}", "template")
        seconds, cpu, rows_done = 0.0, 0.0, 0
        for batch in recorded:
            per = plan.per_pair
            rows = [
                LedgerRow(
                    question.key,
                    batch.pairs[number // per].pair_id,
                    question.principle,
                    question.order,
                    *(0.5, 0.9, "", top, "m", 400, 1, 1e-4, 0.2, 1),
                )
                for number, question in enumerate(plan.batch_questions(batch))
            ]
            started_s, cpu_before = time.perf_counter(), time.process_time()
            ledger.append(plan.recipe, rows)
            seconds += time.perf_counter() - started_s
            cpu += time.process_time() - cpu_before
            rows_done += len(rows)
        started_s = time.perf_counter()
        ledger.close()
        close_s = time.perf_counter() - started_s
        with local_ray():
            started_s = time.time()
            with make_pool(feedback, plan, path) as pool:
                ready_s = time.time() - started_s
                asking = threading.Thread(
                    target=_answer_until_stopped, args=(pool, [*recorded, last]), daemon=True
                )
                asking.start()
                while (
                    not (stats := provider.stats())["arrivals_s"] and time.time() - started_s < 120
                ):
                    time.sleep(0.02)
                first_s = stats["arrivals_s"][0] - started_s
                for worker in pool.workers:
                    worker.stop.options(concurrency_group="control").remote()
                asking.join(60.0)
    return {
        "ledger_rows_per_s": round(rows_done / seconds),
        "ledger_rows_per_cpu_s": round(rows_done / cpu),
        "ledger_rows": rows_done,
        "ledger_close_s": round(close_s, 2),
        "ledger_mb": round(path.stat().st_size / 1e6),
        "resume_1m_rows_s": round(first_s, 2),
        "resume_ledger_opened_s": round(ready_s, 2),
    }


def _answer_until_stopped(pool: Any, batches: list[Any]) -> None:
    with contextlib.suppress(FeedbackError):  # "stopped": the first request is all that is timed
        pool.answer(batches)


# ---------------------------------------------------------------- prefix reuse


def measure_prefix(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """The local judge's figure, where its benchmark is there."""
    try:
        from benchmarks.local_judge import measure_prefix_ratio
    except ImportError:
        return {"prefix_time_ratio_12_vs_1": None}
    found = measure_prefix_ratio(options.prefix_rounds)
    ratio = found.get("prefix_time_ratio_12_vs_1") if isinstance(found, dict) else found
    return (found if isinstance(found, dict) else {}) | {"prefix_time_ratio_12_vs_1": ratio}


if __name__ == "__main__":
    psutil.cpu_percent()
    main()
