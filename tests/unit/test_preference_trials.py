"""What stage 3's driver side does around its trainings, without a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors import preference_trials
from actors.preference_trials import fit_preference_models
from morlaif_ray.config import parse_config

pytestmark = pytest.mark.unit


def test_notes_are_said_once_and_also_where_the_trainings_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import tune

    class Lost(Exception): ...

    class FailingTuner:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def fit(self) -> None:
            (tmp_path / "notes" / "b.txt").write_text("b: out of memory\n", encoding="utf-8")
            raise Lost

    monkeypatch.setattr(preference_trials, "cluster_has_gpu", lambda: False)
    monkeypatch.setattr(tune, "Tuner", FailingTuner)
    (tmp_path / "notes").mkdir()
    # A killed driver said nothing of this one.
    (tmp_path / "notes" / "a.txt").write_text("a: 3 ties left out\n", encoding="utf-8")
    said: list[str] = []
    config = parse_config({}, "test")

    def fit() -> None:
        fit_preference_models(config, tmp_path, {"a": ["a"]}, "", lambda _: None, said.append)

    with pytest.raises(Lost):
        fit()
    assert said == ["a: 3 ties left out", "b: out of memory"]
    (tmp_path / "models" / "a").mkdir()
    fit()  # nothing left to train, nothing left to say
    assert len(said) == 2
