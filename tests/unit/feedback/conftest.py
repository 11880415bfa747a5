"""A fake provider with a Batch API, and the key that it takes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fake_openai.batches import FakeBatchAPI
from tests.fake_openai.server import KEY


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeBatchAPI]:
    monkeypatch.setenv("TEST_JUDGE_KEY", KEY)
    with FakeBatchAPI() as fake:
        yield fake
