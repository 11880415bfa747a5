"""The readers turn every supported form into the same records."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from morlaif_ray.config import Config, parse_config
from morlaif_ray.data import LoadedData, load_dataset_records
from morlaif_ray.errors import DataError

HH_TEST = Path(__file__).parents[4] / "shared" / "data" / "hh-harmless-test" / "test.jsonl.gz"
OASST = Path(__file__).parents[4] / "shared" / "data" / "oasst-en100" / "en_100_tree.jsonl"


def config_for(
    source: dict[str, Any], seed: int = 0, pairs: str = "dataset", **data: Any
) -> Config:
    raw = {"seed": seed, "data": {"source": source, **data}, "pairs": {"kind": pairs}}
    return parse_config(raw, "test")


def files(*paths: Path, source_format: str = "hh", **more: Any) -> dict[str, Any]:
    return {
        "kind": "files",
        "paths": [str(path) for path in paths],
        "format": source_format,
        **more,
    }


def hh_rows(num: int) -> list[dict[str, str]]:
    head = "\n\nHuman: Question {}?\n\nAssistant:"
    return [
        {"chosen": head.format(i) + f" good {i}", "rejected": head.format(i) + f" bad {i}"}
        for i in range(num)
    ]


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_last_assistant_turn_is_the_response_and_the_rest_is_the_prompt(
    tmp_path: Path,
) -> None:
    rows = hh_rows(100)
    rows[0] = {
        "chosen": "\n\nHuman: One\n\nAssistant: Two\n\nHuman: Three\n\nAssistant: Four ",
        "rejected": "\n\nHuman: One\n\nAssistant: Two\n\nHuman: Three\n\nAssistant: Five",
    }
    pair = load_dataset_records(config_for(files(write_lines(tmp_path / "x.jsonl", rows)))).pairs[0]
    assert pair.prompt == "\n\nHuman: One\n\nAssistant: Two\n\nHuman: Three\n\nAssistant:"
    assert {pair.response_a, pair.response_b} == {" Four", " Five"}


def test_jsonl_gz_json_and_parquet_give_the_same_records(tmp_path: Path) -> None:
    rows = hh_rows(100)
    plain = write_lines(tmp_path / "rows.jsonl", rows)
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    listed = tmp_path / "rows.json"
    listed.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    columns = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), columns)
    loaded = [
        load_dataset_records(config_for(files(path))) for path in (plain, packed, listed, columns)
    ]
    assert all(item == loaded[0] for item in loaded)
    assert len(loaded[0].pairs) == 100


def test_a_folder_is_read_in_name_order_and_limit_takes_the_first_rows(tmp_path: Path) -> None:
    rows = hh_rows(120)
    write_lines(tmp_path / "b.jsonl", rows[60:])
    write_lines(tmp_path / "a.jsonl", rows[:60])
    (tmp_path / "notes.txt").write_text("not data")
    loaded = load_dataset_records(config_for(files(tmp_path, limit=100)))
    assert [prompt.text for prompt in loaded.prompts] == [
        f"\n\nHuman: Question {i}?\n\nAssistant:" for i in range(100)
    ]


def test_the_chosen_response_stands_in_either_slot_and_the_label_says_which(
    tmp_path: Path,
) -> None:
    path = write_lines(tmp_path / "rows.jsonl", hh_rows(400))
    pairs = load_dataset_records(config_for(files(path))).pairs
    for pair in pairs:
        preferred = pair.response_a if pair.human_label == 1.0 else pair.response_b
        assert preferred.startswith(" good")
    share_first = sum(pair.human_label for pair in pairs) / len(pairs)
    assert 0.4 < share_first < 0.6  # standard deviation 0.025


def test_slots_and_splits_depend_on_content_and_seed_and_not_on_row_order(tmp_path: Path) -> None:
    rows = hh_rows(200)
    forward = load_dataset_records(config_for(files(write_lines(tmp_path / "f.jsonl", rows))))
    backward = load_dataset_records(
        config_for(files(write_lines(tmp_path / "b.jsonl", rows[::-1])))
    )
    reseeded = load_dataset_records(config_for(files(tmp_path / "f.jsonl"), seed=1))
    assert set(forward.pairs) == set(backward.pairs)
    assert set(forward.prompts) == set(backward.prompts)
    assert set(forward.pairs) != set(reseeded.pairs)


def test_no_prompt_stands_in_two_splits_and_shares_come_out_as_asked(tmp_path: Path) -> None:
    rows = hh_rows(2000)
    again = [{**row, "chosen": row["chosen"] + " too"} for row in rows]
    path = write_lines(tmp_path / "rows.jsonl", rows + again)
    config = config_for(files(path))
    loaded = load_dataset_records(config)
    splits_of: dict[str, set[str]] = {}
    for pair in loaded.pairs:
        splits_of.setdefault(pair.prompt, set()).add(pair.split)
    assert len(loaded.prompts) == 2000
    assert len(loaded.pairs) == 4000
    assert all(len(splits) == 1 for splits in splits_of.values())
    for split, share in config.data.splits.model_dump().items():
        found = sum(prompt.split == split for prompt in loaded.prompts) / 2000
        assert abs(found - share) < 0.04, split  # more than three standard deviations


def test_dialogues_are_the_chosen_responses_of_the_sft_split_only(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", hh_rows(200))
    loaded = load_dataset_records(config_for(files(path)))
    sft = {prompt.text for prompt in loaded.prompts if prompt.split == "sft"}
    assert {dialogue.prompt for dialogue in loaded.dialogues} == sft
    assert all(dialogue.response.startswith(" good") for dialogue in loaded.dialogues)


def test_identical_and_repeated_pairs_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = hh_rows(100)
    same = {"chosen": rows[0]["chosen"], "rejected": rows[0]["chosen"]}
    swapped = {"chosen": rows[1]["rejected"], "rejected": rows[1]["chosen"]}
    path = write_lines(tmp_path / "rows.jsonl", [*rows, same, rows[2], swapped])
    loaded = load_dataset_records(config_for(files(path)))
    assert (len(loaded.pairs), loaded.num_identical, loaded.num_duplicates) == (100, 1, 2)


def test_pairs_take_plain_prompts_and_every_form_of_label(tmp_path: Path) -> None:
    labels: list[Any] = [1, 0, "a", "B", True, None, 0.0]
    rows: list[dict[str, Any]] = [
        {"prompt": f"Question {i}", "response_a": "first", "response_b": "second", "label": label}
        for i, label in enumerate(labels * 20)
    ]
    for row in rows:
        if row["label"] is None:
            del row["label"]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    loaded = load_dataset_records(config_for(files(path, source_format="pairs")))
    assert loaded.pairs[0].prompt == "\n\nHuman: Question 0\n\nAssistant:"
    wanted = [" first", " second", " first", " second", " first", None, " second"]
    for pair, preferred in zip(loaded.pairs, wanted * 20, strict=True):
        if preferred is None:
            assert math.isnan(pair.human_label)
        else:
            assert (pair.response_a if pair.human_label == 1.0 else pair.response_b) == preferred


def test_unlabelled_pairs_teach_no_demonstration(tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {i}", "response_a": "x", "response_b": "y"} for i in range(100)]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(
        DataError, match="split 'sft' holds no dialogue with a preferred response out of 100"
    ):
        load_dataset_records(config_for(files(path, source_format="pairs")))


def test_conversations_with_and_without_a_prompt_list_are_the_same(tmp_path: Path) -> None:
    implicit, explicit, repeated = [], [], []
    for i in range(100):
        prompt = [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": f"Hi {i}"},
            {"role": "assistant", "content": "Hey"},
            {"role": "user", "content": "Bye"},
        ]
        good = [{"role": "assistant", "content": "Farewell"}]
        bad = [{"role": "assistant", "content": "Whatever"}]
        implicit.append({"chosen": prompt + good, "rejected": prompt + bad})
        explicit.append({"prompt": prompt, "chosen": good, "rejected": bad})
        repeated.append({"prompt": prompt, "chosen": prompt + good, "rejected": prompt + bad})
    loaded = [
        load_dataset_records(
            config_for(
                files(write_lines(tmp_path / f"{name}.jsonl", rows), source_format="conversational")
            )
        )
        for name, rows in (("i", implicit), ("e", explicit), ("r", repeated))
    ]
    assert loaded[0] == loaded[1] == loaded[2]
    assert loaded[0].prompts[0].text == (
        "\n\nHuman: Be kind.\n\nHi 0\n\nAssistant: Hey\n\nHuman: Bye\n\nAssistant:"
    )


def test_long_prompts_lose_their_oldest_turns(tmp_path: Path) -> None:
    rows = hh_rows(100)
    for row in rows:
        for key in row:
            row[key] = "\n\nHuman: " + "old " * 30 + "\n\nAssistant: Well." + row[key]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    loaded = load_dataset_records(config_for(files(path), max_prompt_chars=100))
    assert loaded.prompts[7].text == "\n\nHuman: Question 7?\n\nAssistant:"


def test_the_hub_reader_reads_a_local_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    path = write_lines(folder / "train.jsonl", hh_rows(100))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from_hub = load_dataset_records(config_for({"kind": "hub", "id": str(folder)}))
    assert from_hub == load_dataset_records(config_for(files(path)))
    with pytest.raises(DataError, match=r"split 'dev'\): cannot be loaded \(Unknown split"):
        load_dataset_records(config_for({"kind": "hub", "id": str(folder), "split": "dev"}))


def test_a_hub_folder_that_is_absent_says_what_to_check(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    with pytest.raises(DataError, match="check id, subset, split and revision") as caught:
        load_dataset_records(config_for({"kind": "hub", "id": str(absent)}))
    assert "\n" not in caught.value.message


def test_the_test_bed_gives_one_demonstration_per_sft_prompt() -> None:
    source = {"kind": "testbed", "num_prompts": 500}
    config = config_for(source, pairs="sample")
    loaded = load_dataset_records(config)
    again = load_dataset_records(config)
    assert loaded == again
    assert (len(loaded.prompts), loaded.pairs) == (500, [])
    sft = [prompt.text for prompt in loaded.prompts if prompt.split == "sft"]
    assert [dialogue.prompt for dialogue in loaded.dialogues] == sft
    assert all(dialogue.response[:1] == " " for dialogue in loaded.dialogues)


def test_the_test_bed_says_how_many_prompts_it_has() -> None:
    with pytest.raises(DataError, match=r"num_prompts is 100000000, but the test-bed has \d+"):
        load_dataset_records(
            config_for({"kind": "testbed", "num_prompts": 100_000_000}, pairs="sample")
        )


@pytest.fixture
def real_hh() -> LoadedData:
    if not HH_TEST.is_file():
        pytest.skip("the hh-harmless-test data is not at ../shared/data (it is never committed)")
    return load_dataset_records(config_for(files(HH_TEST), on_bad_row="skip"))


def test_the_real_hh_test_set_reads_with_nine_malformed_rows(real_hh: LoadedData) -> None:
    assert real_hh.num_rows == 2312
    assert len(real_hh.pairs) == 2303
    assert {row.line for row in real_hh.bad_rows} == {
        *(87, 517, 926, 1104),  # empty chosen responses
        *(1255, 1689, 1951, 1953, 2037),  # other prompts
    }
    assert all(pair.response_a != pair.response_b for pair in real_hh.pairs)


def test_a_tree_of_messages_is_refused_with_the_keys_it_has() -> None:
    if not OASST.is_file():
        pytest.skip("the oasst-en100 data is not at ../shared/data (it is never committed)")
    with pytest.raises(DataError, match=r"line 1: key 'chosen' is missing \(keys: message_tree_id"):
        load_dataset_records(config_for(files(OASST)))
