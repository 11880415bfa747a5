"""Bad input ends in one line that says what, where, and what to write instead; what was published stays."""

from __future__ import annotations

import errno
import json
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from jobs import fit_weights
from jobs.checks import check_before_start
from jobs.cli import main
from jobs.context import JobContext
from jobs.progress import Reporter
from morlaif_ray.config import load_config
from tests.jobs.commands import ROOT, SMOKE, FinishedRun, file_hashes, small

pytestmark = [pytest.mark.jobs, pytest.mark.timeout(600)]
FIRST_SECONDS = 10.0
"""Nothing here loads a model or starts Ray; the limit is wide because test machines are busy."""


@dataclass(frozen=True)
class Ended:
    code: int
    error: str
    """The line after `error: `."""


@pytest.fixture
def morlaif(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Ended]]:
    """Runs the command in this process; checks that it fails fast, in one line, without Ray."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def no_ray(*_: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("actors.session._start_local", no_ray)
    monkeypatch.setattr("actors.session._attach", _only_checks_address)

    def run(*words: str) -> Ended:
        started = time.monotonic()
        code = main(list(words))
        assert time.monotonic() - started < FIRST_SECONDS
        printed = capsys.readouterr()
        errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
        assert code != 0
        assert printed.out == ""
        assert errors == printed.err.splitlines()[-1:]
        return Ended(code, errors[0].removeprefix("error: "))

    yield run
    signal.signal(signal.SIGTERM, handler)


def _only_checks_address(address: str, cluster: object, say: object) -> None:
    from actors.session import check_reachable

    check_reachable(address, 1.0)
    raise AssertionError("Ray was reached")


def setting(*settings: str) -> list[str]:
    return [word for item in settings for word in ("--set", item)]


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


def test_a_run_folder_of_another_config_says_what_differs_and_stays_as_it_is(
    morlaif: Callable[..., Ended], run_copy: Path
) -> None:
    before = file_hashes(run_copy)
    ended = morlaif(*small(run_copy, *setting("sft.num_steps=31", "reward.num_bootstrap=51")))
    assert ended == Ended(
        3,
        f"{run_copy}: holds a run of another config (sft.num_steps: 30 -> 31; reward.num_bootstrap: 50 -> 51); "
        f"choose another --run-dir, or add --accept-config-change to redo the stages that this concerns",
    )
    assert file_hashes(run_copy) == before


def test_sections_that_change_no_result_make_no_other_config(
    run_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    words = setting("cluster.object_store_mb=100", "tracking.tracker=none")
    assert main(small(run_copy, *words, verb="fit_weights")) == 0
    assert "4_reward: up to date, skipped" in capsys.readouterr().err
    signal.signal(signal.SIGTERM, handler)


def test_a_damaged_config_in_the_run_folder_is_named(
    morlaif: Callable[..., Ended], run_copy: Path
) -> None:
    (run_copy / "config.yaml").write_text("a: [")
    ended = morlaif(*small(run_copy))
    assert ended.code == 3
    assert ended.error.startswith(f"{run_copy}/config.yaml: damaged (")


def test_a_stage_that_lacks_a_file_of_its_manifest_names_the_file(
    morlaif: Callable[..., Ended], run_copy: Path
) -> None:
    (run_copy / "1_pairs" / "reference.parquet").unlink()
    assert morlaif(*small(run_copy)) == Ended(
        3,
        f"{run_copy}/1_pairs: file 'reference.parquet' of the manifest is missing; "
        f"move the folder away and run again",
    )


def test_a_damaged_manifest_is_named(morlaif: Callable[..., Ended], run_copy: Path) -> None:
    (run_copy / "1_pairs" / "manifest.json").write_text("{")
    ended = morlaif(*small(run_copy))
    assert ended.code == 3
    assert re.match(
        rf"{run_copy}/1_pairs/manifest.json: damaged manifest \(.*\); move the folder 1_pairs away",
        ended.error,
    )


def test_a_stage_before_its_inputs_says_which_one_to_run(
    morlaif: Callable[..., Ended], tmp_path: Path
) -> None:
    ended = morlaif(*small(tmp_path / "run", verb="fit_weights"))
    assert ended == Ended(3, f"{tmp_path}/run/1_pairs: not published yet; run the stage first")


def test_a_run_folder_below_a_file_cannot_be_created(
    morlaif: Callable[..., Ended], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    ended = morlaif(*small(tmp_path / "file" / "run"))
    assert ended.code == 3
    assert ended.error.startswith(f"{tmp_path}/file/run: cannot be created (Not a directory: ")
    assert ended.error.endswith("choose another --run-dir")
    assert morlaif(*small(tmp_path / "file")).error == (
        f"{tmp_path}/file: is a file; choose another --run-dir"
    )


def test_a_read_only_run_folder_is_said_to_be_one(
    morlaif: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)  # tests may run as root, whom no mode stops
    assert morlaif(*small(tmp_path / "run")) == Ended(
        3,
        f"{tmp_path}/run: cannot be written (Read-only file system); choose another --run-dir",
    )


def test_a_full_disk_at_the_start_leaves_the_old_config_as_it_was(
    morlaif: Callable[..., Ended], run_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = file_hashes(run_copy)

    def full(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    ended = morlaif(*small(run_copy))
    assert ended == Ended(
        3,
        f"{run_copy}: the disk is full; free some space and run the same command again "
        f"(what was published stays)",
    )
    assert file_hashes(run_copy) == before


@pytest.mark.parametrize("where", ["stage", "work"])
def test_a_full_disk_in_a_stage_loses_nothing_and_the_same_command_goes_on(
    morlaif: Callable[..., Ended],
    run_copy: Path,
    finished_run: FinishedRun,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    shutil.rmtree(run_copy / "4_reward")
    before = file_hashes(run_copy)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        # Inside the stage folder, and outside of it (checkpoints and other unfinished work).
        patch.setattr(
            fit_weights, "write_reward" if where == "stage" else "read_reward_inputs", full
        )
        ended = morlaif(*small(run_copy, verb="fit_weights"))
    assert ended.code == 3
    assert ended.error.endswith(
        "the disk is full; free some space and run the same command again (what was published stays)"
    )
    assert file_hashes(run_copy) == before
    assert not (run_copy / ".4_reward.partial").exists()
    handler = signal.getsignal(signal.SIGTERM)
    assert main(small(run_copy, verb="fit_weights")) == 0
    signal.signal(signal.SIGTERM, handler)
    assert file_hashes(run_copy) == file_hashes(finished_run.run_dir)


# ---------------------------------------------------------------- the cluster


def test_an_address_without_ray_fails_in_seconds_and_says_so(
    morlaif: Callable[..., Ended], tmp_path: Path
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, not listening: refuses connections
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        ended = morlaif(*small(tmp_path / "run", *setting(f"cluster.address={address}")))
    assert ended == Ended(
        5,
        f"no Ray at {address} (Connection refused); start one with 'ray start --head', or unset "
        f"cluster.address and RAY_ADDRESS to use a local Ray",
    )


def test_an_address_where_something_else_listens_is_said_to_be_no_ray(
    morlaif: Callable[..., Ended], tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        words = setting(f"cluster.address={address}", "cluster.connect_timeout_s=1")
        ended = morlaif(*small(tmp_path / "run", *words))
    assert ended.code == 5
    assert ended.error.startswith(f"what listens at {address} is not Ray; give the address that")


def test_an_address_of_the_wrong_form_shows_the_right_one(
    morlaif: Callable[..., Ended], tmp_path: Path
) -> None:
    ended = morlaif(*small(tmp_path / "run", *setting("cluster.address=my-cluster")))
    assert ended == Ended(5, "Ray address 'my-cluster': write it as host:port, e.g. 10.0.0.5:6379")


def test_a_plan_that_needs_more_cpus_fails_before_any_stage(
    morlaif: Callable[..., Ended], tmp_path: Path
) -> None:
    ended = morlaif(*small(tmp_path / "run", *setting("cluster.num_cpus=1")))
    assert ended == Ended(
        5,
        "5_policy needs 1.9 CPUs (2 x PPO learner at 0.4 CPU, 2 x rollout worker at 0.4 CPU, "
        "1 x preference model at 0.3 CPU), there are 1; reduce policy.concurrent_arms or policy.num_rollout_workers "
        "or the panel (preference.panel_placement: one_actor), or add CPUs (a local Ray: cluster.num_cpus)",
    )
    assert not (tmp_path / "run" / "0_sft").exists()


@pytest.mark.parametrize("name", ["demo", "smoke"])
def test_the_laptop_configs_pass_all_checks_on_two_cpus(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    check_before_start(JobContext(config, tmp_path, Reporter(quiet=True)))
