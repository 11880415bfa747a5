"""Which samples are written down when a step cannot be learned from."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from morlaif_ray.rl import measuring

pytestmark = pytest.mark.unit
NAN = float("nan")


@pytest.mark.parametrize("where", ["logprobs_BT", "values_BT", "ref_logprobs_BT"])
def test_a_row_that_spoils_the_whitened_advantages_of_all_is_blamed_alone(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluation() -> Any:
        names = ("logprobs_BT", "values_BT", "ref_logprobs_BT")
        return SimpleNamespace(**{name: torch.zeros(4, 3) for name in names})

    experience: Any = SimpleNamespace(
        tokens=None,
        lengths=(3,) * 4,
        old=evaluation(),
        advantages_BT=torch.full((4, 3), NAN),
        returns_BT=torch.zeros(4, 3),
    )
    unused: Any = None
    monkeypatch.setattr(measuring, "measure", lambda *_, **__: (evaluation(), None))
    assert measuring.find_bad_rows(unused, None, experience, 0, [3, 1, 2]) == [3, 1, 2]
    getattr(experience.old, where)[1, 2] = NAN
    assert measuring.find_bad_rows(unused, None, experience, 0, [3, 1, 2]) == [1]
