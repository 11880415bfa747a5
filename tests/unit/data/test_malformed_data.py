"""What a person reads when a data set is wrong: one line with file, line and reason."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from morlaif_ray.config import Config, parse_config
from morlaif_ray.data import BadRow, load_dataset_records
from morlaif_ray.errors import DataError

GOOD = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Hello!",
    "rejected": "\n\nHuman: Hi\n\nAssistant: Go away.",
}


def config_for(path: Path, source_format: str = "hh", **data: Any) -> Config:
    source = {"kind": "files", "paths": [str(path)], "format": source_format}
    return parse_config({"data": {"source": source, **data}, "pairs": {"kind": "dataset"}}, "test")


def hh(number: int, chosen: str = "yes", rejected: str = "no") -> dict[str, str]:
    head = f"\n\nHuman: Question {number}?\n\nAssistant:"
    return {"chosen": f"{head} {chosen}", "rejected": f"{head} {rejected}"}


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def message_of(path: Path, source_format: str = "hh", **data: Any) -> str:
    with pytest.raises(DataError) as caught:
        load_dataset_records(config_for(path, source_format, **data))
    assert "\n" not in caught.value.message
    return caught.value.message


def test_a_missing_file_is_named_with_the_setting_that_gives_it(tmp_path: Path) -> None:
    path = tmp_path / "absent.jsonl"
    assert message_of(path) == (
        f"{path}: no such file; set data.source.paths (e.g. --set data.source.paths=[FILE])"
    )


def test_an_empty_data_set_is_said_to_be_empty(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "empty.jsonl", [])
    assert message_of(path) == f"{path}: the data set is empty; it holds no row"


def test_an_empty_folder_lists_the_extensions_it_looked_for(tmp_path: Path) -> None:
    assert message_of(tmp_path) == (
        f"{tmp_path}: the folder holds no .jsonl, .jsonl.gz, .json, .parquet file"
    )


def test_a_wrong_extension_lists_the_right_ones(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("chosen,rejected\n")
    assert message_of(path) == (
        f"{path}: unknown extension '.csv'; give .jsonl, .jsonl.gz, .json, .parquet"
    )


def test_bytes_that_are_not_utf8_are_found_by_line_and_byte(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"chosen": "caf\xe9"}\n')
    assert f"{path}: line 2: byte 16 (0xe9) is not UTF-8; mend the row" in message_of(path)


def test_a_json_file_with_wrong_bytes_is_found_by_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.json"
    path.write_bytes(b'[\n{"chosen": "caf\xe9"}]')
    assert message_of(path) == f"{path}: line 2: byte 0xe9 is not UTF-8"


def test_invalid_json_is_found_by_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text(json.dumps(GOOD) + '\n\n{"chosen": }\n')
    assert f"{path}: line 3: not valid JSON (Expecting value at column 12)" in message_of(path)


def test_json_lines_in_a_json_file_are_told_their_name(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "lines.json", [GOOD, GOOD])
    assert message_of(path) == (
        f"{path}: line 2: not valid JSON (Extra data); where each line is an object, name it .jsonl"
    )


def test_a_json_file_must_hold_a_list(tmp_path: Path) -> None:
    path = tmp_path / "object.json"
    path.write_text(json.dumps(GOOD))
    assert message_of(path) == f"{path}: must hold a list of rows, not dict"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": GOOD["chosen"]}, "key 'rejected' is missing (keys: chosen)"),
        ([1, 2], "must be an object with keys, not list"),
        ({**GOOD, "chosen": 7}, "'chosen' must be text, not int"),
        (
            {**GOOD, "chosen": [{"role": "user"}]},
            "'chosen' must be text, not list; is this data.source.format: conversational?",
        ),
        (
            {**GOOD, "rejected": "\n\nHuman: Bye\n\nAssistant: Bye."},
            "'chosen' and 'rejected' answer different prompts",
        ),
        (
            {**GOOD, "chosen": "\n\nHuman: Hi\n\nAssistant:  "},
            "the response in 'chosen' is empty",
        ),
        ({**GOOD, "chosen": "Hello there"}, "'chosen' must begin with a 'Human:' turn"),
        ({**GOOD, "rejected": "\n\nHuman: Hi"}, "'rejected' has no 'Assistant:' turn"),
        (
            {**GOOD, "chosen": "\n\nHuman: Hi\n\nAssistant: Hey\n\nHuman: Bye"},
            "'chosen' ends with a 'Human:' turn; the last turn must be the Assistant's",
        ),
    ],
)
def test_a_malformed_hh_row_is_named_by_line_and_reason(
    tmp_path: Path, row: Any, reason: str
) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [GOOD, row])
    assert message_of(path) == (
        f"{path}: line 2: {reason}; mend the row, or count and skip such rows with --set data.on_bad_row=skip"
    )


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Hi", "response_a": "x"}, "key 'response_b' is missing"),
        ({"prompt": " ", "response_a": "x", "response_b": "y"}, "'prompt' is empty"),
        (
            {"prompt": "Hi", "response_a": "x", "response_b": ""},
            "the response in 'response_b' is empty",
        ),
        (
            {"prompt": "Hi", "response_a": "x", "response_b": "y", "label": 2},
            "'label' must be 1 or 'a' (response_a is better), 0 or 'b', or null; not 2",
        ),
    ],
)
def test_a_malformed_pair_row_is_named_by_line_and_reason(
    tmp_path: Path, row: Any, reason: str
) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [row])
    assert f"{path}: line 1: {reason}" in message_of(path, "pairs")


USER = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": [USER, REPLY]}, "key 'rejected' is missing"),
        (
            {"chosen": "text", "rejected": "text"},
            "'chosen' must be a list of messages, not str",
        ),
        (
            {"chosen": [USER, {"role": "bot", "content": "x"}], "rejected": [USER, REPLY]},
            "message 2 of 'chosen' needs a 'role' (system, user, assistant) and a text 'content'",
        ),
        (
            {"chosen": [USER], "rejected": [USER, REPLY]},
            "the last message of 'chosen' must be the assistant's",
        ),
        (
            {"chosen": [REPLY], "rejected": [REPLY]},
            "the first message after 'system' must be the user's",
        ),
        (
            {"chosen": [USER, REPLY, REPLY], "rejected": [USER, REPLY, REPLY]},
            "the prompt must end with a user message",
        ),
        (
            {"chosen": [USER, REPLY], "rejected": [{**USER, "content": "Yo"}, REPLY]},
            "'chosen' and 'rejected' answer different prompts",
        ),
    ],
)
def test_a_malformed_conversation_is_named_by_line_and_reason(
    tmp_path: Path, row: Any, reason: str
) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [row])
    assert f"{path}: line 1: {reason}" in message_of(path, "conversational")


def test_a_truncated_gzip_file_is_said_to_be_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    whole = gzip.compress("".join(json.dumps(hh(i)) + "\n" for i in range(500)).encode())
    path.write_bytes(whole[: len(whole) // 2])
    expected = f"{path}: the gzip file is cut off; fetch it again"
    assert message_of(path) == expected
    # Not a malformed row: no one can say how many are missing, so skipping does not apply.
    assert message_of(path, on_bad_row="skip") == expected


def test_a_damaged_gzip_file_is_said_to_be_damaged(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    whole = bytearray(gzip.compress(json.dumps(GOOD).encode() * 50))
    whole[-6] ^= 0xFF  # in the checksum
    path.write_bytes(bytes(whole))
    assert message_of(path).startswith(f"{path}: the gzip file is damaged (CRC check failed")


def test_plain_text_named_gz_and_gzip_named_jsonl_are_told_their_names(tmp_path: Path) -> None:
    plain = write_lines(tmp_path / "plain.jsonl.gz", [GOOD])
    assert message_of(plain) == f"{plain}: not a gzip file; where it is plain text, name it .jsonl"
    packed = tmp_path / "packed.jsonl"
    packed.write_bytes(gzip.compress(b"{}"))
    assert message_of(packed) == f"{packed}: holds gzip data; name it .jsonl.gz"


def test_a_parquet_file_that_is_not_parquet_is_said_so(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_text("this is no parquet file at all")
    assert message_of(path).startswith(f"{path}: not a Parquet file (Parquet magic bytes not found")


def test_parquet_named_jsonl_is_told_its_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    pq.write_table(pa.Table.from_pylist([GOOD]), path)
    assert message_of(path) == f"{path}: holds Parquet data; name it .parquet"


def test_a_malformed_parquet_row_is_named_by_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([GOOD, {**GOOD, "chosen": None}]), path)
    assert message_of(path).startswith(f"{path}: row 2: 'chosen' must be text, not NoneType")


def test_a_data_set_of_identical_responses_has_nothing_to_prefer(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "same.jsonl", [hh(i, "same", "same") for i in range(3)])
    assert message_of(path) == (
        f"{path}: the two responses are identical in all 3 usable rows; there is nothing to prefer"
    )


def test_a_data_set_without_one_usable_row_shows_the_first_reason(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"text": "x"}, {"text": "y"}])
    assert message_of(path, on_bad_row="skip") == (
        f"{path}: none of the 2 rows is usable; the first: {path}: line 1: key 'chosen' is missing (keys: text) "
        f"(is data.source.format right?)"
    )


def test_a_split_without_prompts_is_named_before_any_stage_runs(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "few.jsonl", [hh(i) for i in range(2)])
    assert message_of(path).startswith(f"{path}: split '")
    assert "out of 2 prompts; give more data, or raise data.splits." in message_of(path)


def test_a_last_turn_longer_than_the_limit_names_the_limit(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "long.jsonl", [hh(1)])
    assert message_of(path, max_prompt_chars=20).startswith(
        f"{path}: line 1: the last Human turn alone makes a prompt of 32 characters; "
        f"raise data.max_prompt_chars (20)"
    )


def test_skipped_rows_are_listed_with_file_line_and_reason(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows: list[Any] = [hh(i) for i in range(80)]
    rows[4] = {"chosen": "x"}
    write_lines(path, rows)
    with path.open("ab") as stream:
        stream.write(b"\xff\n")
    loaded = load_dataset_records(config_for(path, on_bad_row="skip"))
    assert loaded.bad_rows == [
        BadRow(str(path), 5, "'chosen' must begin with a 'Human:' turn"),
        BadRow(str(path), 81, "byte 1 (0xff) is not UTF-8"),
    ]
    assert loaded.num_rows == 81
    assert len(loaded.pairs) == 79
