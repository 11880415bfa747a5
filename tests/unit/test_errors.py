"""Errors cross process borders whole."""

from __future__ import annotations

import pickle
import re

import pytest

from morlaif_ray import errors
from morlaif_ray.errors import MorlaifError

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("error")]


def every_class(base: type[MorlaifError] = MorlaifError) -> list[type[MorlaifError]]:
    found = [base]
    for child in base.__subclasses__():
        if child.__module__ == errors.__name__:
            found += every_class(child)
    return found


@pytest.mark.parametrize("cls", every_class())
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_an_error_survives_pickling(cls: type[MorlaifError], protocol: int) -> None:
    back = pickle.loads(pickle.dumps(cls("what: where; ü"), protocol))
    assert type(back) is cls
    assert str(back) == back.message == "what: where; ü"
    assert back.exit_code == cls.exit_code != 0


def test_every_error_can_be_caught_as_one() -> None:
    for cls in every_class():
        with pytest.raises(MorlaifError, match="x"):
            raise cls("x")


def test_the_drawn_tree_is_the_tree() -> None:
    assert errors.__doc__ is not None
    drawn = set(re.findall(r"[├└]─ (\w+)", errors.__doc__))
    assert drawn == {cls.__name__ for cls in every_class()} - {"MorlaifError"}
