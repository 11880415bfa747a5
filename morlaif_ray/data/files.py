"""Raw rows of local files, one at a time, each with its file and line.

A damaged row (not UTF-8, not JSON) comes out as a row with a `problem`; a damaged file (missing, truncated gzip, not
Parquet) raises DataError, because no one can say how many rows it holds.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from morlaif_ray.data.rows import RawRow
from morlaif_ray.errors import DataError

EXTENSIONS = (".jsonl", ".jsonl.gz", ".json", ".parquet")
GZIP_MAGIC = b"\x1f\x8b"
PARQUET_MAGIC = b"PAR1"


def expand_paths(paths: Sequence[Path]) -> list[Path]:
    """Files as they are, folders as their data files in name order."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(item for item in path.iterdir() if _extension(item) and item.is_file())
            if not found:
                raise DataError(f"{path}: the folder holds no {', '.join(EXTENSIONS)} file")
            files += found
        elif not path.exists():
            raise DataError(
                f"{path}: no such file; set data.source.paths (e.g. --set data.source.paths=[FILE])"
            )
        elif _extension(path) is None:
            raise DataError(
                f"{path}: unknown extension '{path.suffix}'; give {', '.join(EXTENSIONS)}"
            )
        else:
            files.append(path)
    return files


def read_rows(path: Path) -> Iterator[RawRow]:
    """All rows of one file."""
    readers = {
        ".jsonl": _read_jsonl,
        ".jsonl.gz": _read_jsonl_gz,
        ".json": _read_json,
        ".parquet": _read_parquet,
    }
    extension = _extension(path)
    assert extension is not None, "expand_paths has let a wrong extension through"
    try:
        yield from readers[extension](path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def _extension(path: Path) -> str | None:
    name = path.name.lower()
    return next(
        (item for item in sorted(EXTENSIONS, key=len, reverse=True) if name.endswith(item)), None
    )


def _read_jsonl(path: Path) -> Iterator[RawRow]:
    with path.open("rb") as stream:
        _refuse_other_format(path, stream.read(4))
        stream.seek(0)
        yield from _lines(path, stream)


def _read_jsonl_gz(path: Path) -> Iterator[RawRow]:
    with path.open("rb") as raw:
        if raw.read(2) not in (GZIP_MAGIC, b""):
            raise DataError(f"{path}: not a gzip file; where it is plain text, name it .jsonl")
    try:
        with gzip.open(path, "rb") as stream:
            yield from _lines(path, stream)
    except EOFError:
        raise DataError(f"{path}: the gzip file is cut off; fetch it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: the gzip file is damaged ({error}); fetch it again") from None


def _refuse_other_format(path: Path, head: bytes) -> None:
    if head.startswith(GZIP_MAGIC):
        raise DataError(f"{path}: holds gzip data; name it .jsonl.gz")
    if head == PARQUET_MAGIC:
        raise DataError(f"{path}: holds Parquet data; name it .parquet")


def _lines(path: Path, stream: BinaryIO | gzip.GzipFile) -> Iterator[RawRow]:
    lines: Iterable[bytes] = stream
    for number, raw in enumerate(lines, start=1):
        if not raw.strip():
            continue
        value, problem = _decode(raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw)
        yield RawRow(str(path), number, "line", value, problem)


def _decode(raw: bytes) -> tuple[Any, str]:
    try:
        return json.loads(raw.decode("utf-8")), ""
    except UnicodeDecodeError as error:
        return None, f"byte {error.start + 1} (0x{raw[error.start]:02x}) is not UTF-8"
    except json.JSONDecodeError as error:
        return None, f"not valid JSON ({error.msg} at column {error.colno})"


def _read_json(path: Path) -> Iterator[RawRow]:
    content = path.read_bytes()
    _refuse_other_format(path, content[:4])
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}: line {line}: byte 0x{content[error.start]:02x} is not UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        hint = "; where each line is an object, name it .jsonl" if error.msg == "Extra data" else ""
        raise DataError(
            f"{path}: line {error.lineno}: not valid JSON ({error.msg}){hint}"
        ) from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: must hold a list of rows, not {type(rows).__name__}")
    for number, value in enumerate(rows, start=1):
        yield RawRow(str(path), number, "row", value)


def _read_parquet(path: Path) -> Iterator[RawRow]:
    try:
        with pq.ParquetFile(path) as table:
            number = 0
            for batch in table.iter_batches(batch_size=4096):
                for value in batch.to_pylist():
                    number += 1
                    yield RawRow(str(path), number, "row", value)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from None
