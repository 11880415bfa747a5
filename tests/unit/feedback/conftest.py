"""Fake providers, and the key that they take."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fake_openai.batches import FakeBatchAPI
from tests.fake_openai.server import KEY, FakeOpenAI


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeBatchAPI]:
    monkeypatch.setenv("TEST_JUDGE_KEY", KEY)
    with FakeBatchAPI() as fake:
        yield fake


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeOpenAI]:
    monkeypatch.setenv("TEST_JUDGE_KEY", KEY)
    with FakeOpenAI() as fake:
        yield fake
