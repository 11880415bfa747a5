"""`load_dataset_records(config)`: from a source to prompts, dialogues and pairs, or to a line that says what is wrong.

Contract: depends on the config and the bytes of the source alone. No prompt stands in two splits; prompts and pairs are
unique and keep the source's order; a pair has two different responses. With `data.on_bad_row: skip`, malformed rows
are listed in `bad_rows`; else the first one raises DataError with file, line and reason.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

from morlaif_ray.config import Config
from morlaif_ray.config.inputs import FileSource, HubSource, TestbedSource
from morlaif_ray.data.dialogues import drop_oldest_turns
from morlaif_ray.data.files import expand_paths, read_rows
from morlaif_ray.data.formats import PARSERS, Example
from morlaif_ray.data.hub import read_hub_rows
from morlaif_ray.data.rows import BadRow, RawRow, RowProblem
from morlaif_ray.data.splits import make_pair, make_prompt
from morlaif_ray.errors import DataError
from morlaif_ray.seeding import derive_seed
from morlaif_ray.types import Dialogue, Prompt, ResponsePair, Split


@dataclass(frozen=True)
class LoadedData:
    """Everything one source gave. Produced by `load_dataset_records`, consumed by `train_sft` and `sample_pairs`."""

    prompts: list[Prompt]
    dialogues: list[Dialogue]
    """Demonstrations for SFT: the preferred (test-bed: the sampled) response of every prompt of split `sft`."""
    pairs: list[ResponsePair]
    """Pairs of all splits; empty on the test-bed, which has prompts only."""
    bad_rows: list[BadRow]
    num_rows: int
    """Rows read, bad ones included."""
    num_identical: int = 0
    """Rows dropped because their two responses are equal."""
    num_duplicates: int = 0
    """Rows dropped because an earlier one holds the same prompt and the same two responses."""


def load_dataset_records(config: Config) -> LoadedData:
    """Reads `config.data.source`; raises DataError with one line that says what, where, and what to do."""
    source = config.data.source
    if isinstance(source, TestbedSource):
        loaded = _load_testbed(config, source)
    else:
        collector = _Collector(config)
        for row in _raw_rows(source):
            collector.add(row)
        loaded = collector.finish(_name_of(source))
    _check_splits(config, loaded, _name_of(source))
    return loaded


def _raw_rows(source: FileSource | HubSource) -> Iterator[RawRow]:
    rows: Iterable[RawRow]
    if isinstance(source, FileSource):
        files = expand_paths(source.paths)
        rows = (row for path in files for row in read_rows(path))
    else:
        rows = read_hub_rows(source)
    return islice(rows, source.limit)


def _name_of(source: TestbedSource | FileSource | HubSource) -> str:
    if isinstance(source, FileSource):
        return ", ".join(str(path) for path in source.paths)
    return source.id if isinstance(source, HubSource) else "the test-bed"


@dataclass
class _Collector:
    """Collects rows into records; keeps prompts and pairs unique."""

    config: Config
    prompts: dict[str, Prompt] = field(default_factory=dict)
    dialogues: dict[tuple[str, str], Dialogue] = field(default_factory=dict)
    pairs: dict[str, ResponsePair] = field(default_factory=dict)
    bad_rows: list[BadRow] = field(default_factory=list)
    num_rows: int = 0
    num_identical: int = 0
    num_duplicates: int = 0

    def add(self, row: RawRow) -> None:
        self.num_rows += 1
        try:
            example = self._parse(row)
        except RowProblem as problem:
            if self.config.data.on_bad_row == "error":
                raise DataError(
                    f"{row.file}: {row.unit} {row.line}: {problem}; mend the row, or count and skip such rows "
                    f"with --set data.on_bad_row=skip"
                ) from None
            self.bad_rows.append(BadRow(row.file, row.line, str(problem)))
            return
        self._keep(example)

    def _parse(self, row: RawRow) -> Example:
        if row.problem:
            raise RowProblem(row.problem)
        if not isinstance(row.value, Mapping):
            raise RowProblem(f"must be an object with keys, not {type(row.value).__name__}")
        source = self.config.data.source
        assert not isinstance(source, TestbedSource)
        example = PARSERS[source.format](row.value)
        prompt = drop_oldest_turns(example.prompt, self.config.data.max_prompt_chars)
        return Example(prompt, example.first, example.second, example.label)

    def _keep(self, example: Example) -> None:
        config = self.config
        prompt = self.prompts.get(example.prompt)
        if prompt is None:
            prompt = make_prompt(config.seed, example.prompt, config.data.splits)
            self.prompts[example.prompt] = prompt
        preferred = {1.0: example.first, 0.0: example.second}.get(example.label)
        if prompt.split == "sft" and preferred is not None:
            dialogue = Dialogue(prompt.prompt_id, prompt.text, preferred)
            self.dialogues.setdefault((prompt.prompt_id, preferred), dialogue)
        if example.first == example.second:
            self.num_identical += 1
            return
        pair = make_pair(config.seed, prompt, example.first, example.second, example.label)
        if pair.pair_id in self.pairs:
            self.num_duplicates += 1
            return
        self.pairs[pair.pair_id] = pair

    def finish(self, name: str) -> LoadedData:
        if not self.num_rows:
            raise DataError(f"{name}: the data set is empty; it holds no row")
        if not self.prompts:
            first = self.bad_rows[0]
            raise DataError(
                f"{name}: none of the {self.num_rows} rows is usable; the first: {first.file}: line {first.line}: "
                f"{first.reason} (is data.source.format right?)"
            )
        if not self.pairs:
            raise DataError(
                f"{name}: the two responses are identical in all {self.num_identical} usable rows; "
                f"there is nothing to prefer"
            )
        return LoadedData(
            prompts=list(self.prompts.values()),
            dialogues=list(self.dialogues.values()),
            pairs=list(self.pairs.values()),
            bad_rows=self.bad_rows,
            num_rows=self.num_rows,
            num_identical=self.num_identical,
            num_duplicates=self.num_duplicates,
        )


def _load_testbed(config: Config, source: TestbedSource) -> LoadedData:
    from morlaif_ray.testbed import make_prompts, max_prompts, sample_response

    limit = max_prompts()
    if source.num_prompts > limit:
        raise DataError(
            f"data.source.num_prompts is {source.num_prompts}, but the test-bed has {limit} different prompts"
        )
    prompts = [
        make_prompt(config.seed, text, config.data.splits)
        for text in make_prompts(source.num_prompts, config.seed)
    ]
    dialogues = [
        Dialogue(
            prompt.prompt_id,
            prompt.text,
            " " + sample_response(prompt.text, _testbed_random(config.seed, prompt)).strip(),
        )
        for prompt in prompts
        if prompt.split == "sft"
    ]
    return LoadedData(prompts, dialogues, pairs=[], bad_rows=[], num_rows=len(prompts))


def _testbed_random(seed: int, prompt: Prompt) -> random.Random:
    return random.Random(derive_seed(seed, "testbed demonstration", prompt.prompt_id))


def _check_splits(config: Config, loaded: LoadedData, name: str) -> None:
    """Every split that a stage reads must hold something, else that stage would fail hours later."""
    prompts = Counter(prompt.split for prompt in loaded.prompts)
    pairs = Counter(pair.split for pair in loaded.pairs)
    judged = (pairs, "pair") if config.pairs.kind == "dataset" else (prompts, "prompt")
    needed: dict[Split, tuple[Counter[Split], str]] = {"preference": judged, "test": judged}
    if config.reward.weights == "fitted":
        needed["weights"] = judged
    if config.sft.enabled:
        needed["sft"] = (
            Counter({"sft": len(loaded.dialogues)}),
            "dialogue with a preferred response",
        )
    needed["policy"] = (prompts, "prompt")
    for split, (held, kind) in needed.items():
        if not held[split]:
            raise DataError(
                f"{name}: split '{split}' holds no {kind} out of {len(loaded.prompts)} prompts; "
                f"give more data, or raise data.splits.{split}"
            )
