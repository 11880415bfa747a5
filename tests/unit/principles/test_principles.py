"""Principles are files: the shipped twelve, and one's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from morlaif_ray.errors import PrincipleError
from morlaif_ray.principles import PAPER_ORDER, SHIPPED_DIR, load_principles

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("error")]

GOOD = "name: humour\nstatement: A good response is funny.\nquestion: Which one is funnier?\n"


def refused(match: str, *args: object) -> None:
    with pytest.raises(PrincipleError, match=match) as caught:
        load_principles(*args)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_the_papers_twelve_are_shipped_in_its_order() -> None:
    shipped = load_principles()
    assert tuple(p.name for p in shipped) == PAPER_ORDER
    assert len(shipped) == 12
    assert {p.polarity for p in shipped} == {"high_is_good"}
    assert all(p.statement.endswith(".") and p.question.strip() for p in shipped)
    assert len({p.question for p in shipped}) == 12
    assert {path.suffix for path in SHIPPED_DIR.iterdir()} == {".yaml"}


def test_chosen_principles_come_in_the_papers_order() -> None:
    chosen = load_principles(["detail", "helpfulness", "sycophancy"])
    assert [p.name for p in chosen] == ["helpfulness", "sycophancy", "detail"]


def test_an_unknown_name_gets_the_nearest_one() -> None:
    refused("principle 'helpfullness' has no file; did you mean 'helpfulness'", ["helpfullness"])
    refused(r"principle 'xyzzy' has no file; known: bias, conciseness, .*add xyzzy.yaml", ["xyzzy"])


def test_a_principle_twice_or_none_at_all_is_an_error() -> None:
    refused("names a principle twice", ["bias", "bias"])
    refused("feedback.principles is empty", [])


def test_adding_a_principle_is_adding_a_file(tmp_path: Path) -> None:
    (tmp_path / "humour.yaml").write_text(GOOD, encoding="utf-8")
    (tmp_path / "README.md").write_text("not a principle", encoding="utf-8")
    every = load_principles("all", tmp_path)
    assert [p.name for p in every] == [*PAPER_ORDER, "humour"]
    assert every[-1].statement == "A good response is funny."
    assert [p.name for p in load_principles(["humour", "bias"], tmp_path)] == ["bias", "humour"]


def test_ones_own_file_wins_over_the_shipped_one(tmp_path: Path) -> None:
    own = "name: bias\nstatement: Mine.\nquestion: Mine?\npolarity: high_is_bad\n"
    (tmp_path / "bias.yaml").write_text(own, encoding="utf-8")
    (bias,) = load_principles(["bias"], tmp_path)
    assert (bias.statement, bias.polarity) == ("Mine.", "high_is_bad")
    assert len(load_principles("all", tmp_path)) == 12


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    refused("none: no such folder of principles", "all", tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("humour", "name: [\n", "humour.yaml: not valid UTF-8 YAML"),
        ("humour", "", "must hold the keys name, statement, question"),
        ("humour", "- a\n", "must hold the keys name, statement, question"),
        ("humour", GOOD.replace("question", "quest"), "key 'question' is missing or empty"),
        ("humour", GOOD.replace("A good response is funny.", "' '"), "key 'statement' is missing"),
        ("humour", GOOD + "weight: 2\n", "unknown key 'weight'; allowed: name, polarity, question"),
        ("wit", GOOD, "name is 'humour' but the file is 'wit'; make them equal"),
        ("humour", GOOD + "polarity: low\n", "polarity must be high_is_good or high_is_bad, not"),
        ("general", GOOD.replace("humour", "general"), "the name 'general' is taken by a baseline"),
        ("random", GOOD.replace("humour", "random"), "the name 'random' is taken by a baseline"),
        ("baseline_x", GOOD.replace("humour", "baseline_x"), "'baseline_x' is taken by a baseline"),
    ],
)
def test_a_wrong_file_is_named_with_its_mistake(
    tmp_path: Path, name: str, text: str, match: str
) -> None:
    (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    refused(match, "all", tmp_path)


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "humour.yaml").write_bytes(GOOD.encode() + b"# caf\xe9\n")
    refused("humour.yaml: not valid UTF-8 YAML", "all", tmp_path)


def test_a_folder_named_like_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "humour.yaml").mkdir()
    refused(r"humour.yaml: cannot be read \(Is a directory\)", "all", tmp_path)
