"""Principles in plain English, one YAML file each. Adding one = adding a file.

A file holds `name`, `statement` (what the principle asks for), `question` (the phrase put to the judge, which ends the
prompt) and `polarity` ("high_is_good" for all the shipped twelve: the model named `sycophancy` scores
ANTI-sycophancy).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from morlaif_ray.errors import PrincipleError

SHIPPED_DIR = Path(__file__).parent / "files"
PAPER_ORDER = (
    "helpfulness",
    "ethicality",
    "factuality",
    "toxicity",
    "sycophancy",
    "empathy",
    "relevance",
    "context",
    "bias",
    "understandability",
    "detail",
    "conciseness",
)
RESERVED = ("general", "random")
"""Names of the single-objective questions, which stand beside the principles; "baseline_..." is taken, too."""


@dataclass(frozen=True, slots=True)
class Principle:
    """One principle. Produced here, consumed by `feedback` (question) and reports (statement)."""

    name: str
    statement: str
    """One sentence in plain English: what a good response does."""
    question: str
    """The phrase put to the judge after conversation and responses."""
    polarity: Literal["high_is_good", "high_is_bad"] = "high_is_good"


def load_principles(
    names: list[str] | Literal["all"] = "all", extra_dir: Path | None = None
) -> tuple[Principle, ...]:
    """The wanted principles in the paper's order, further ones after it by name.

    Raises PrincipleError where a name has no file (with the nearest name) or a file is wrong.
    """
    known = _read_folder(SHIPPED_DIR)
    if extra_dir is not None:
        if not extra_dir.is_dir():
            raise PrincipleError(f"{extra_dir}: no such folder of principles")
        known |= _read_folder(extra_dir)
    if names == "all":
        chosen = list(known)
    else:
        for name in names:
            if name not in known:
                raise PrincipleError(_unknown(name, list(known)))
        if len(set(names)) != len(names):
            raise PrincipleError("feedback.principles names a principle twice")
        chosen = list(names)
    if not chosen:
        raise PrincipleError(
            "feedback.principles is empty; name at least one principle or write 'all'"
        )
    rank = {name: index for index, name in enumerate(PAPER_ORDER)}
    chosen.sort(key=lambda name: (rank.get(name, len(rank)), name))
    return tuple(known[name] for name in chosen)


def _unknown(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(sorted(known))}"
    return f"principle '{name}' has no file; {hint} (add {name}.yaml to feedback.principles_dir to define it)"


def _read_folder(folder: Path) -> dict[str, Principle]:
    found: dict[str, Principle] = {}
    for path in sorted(folder.glob("*.yaml")):
        principle = _read_file(path)
        found[principle.name] = principle
    return found


def _read_file(path: Path) -> Principle:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        raise PrincipleError(f"{path}: not valid UTF-8 YAML") from None
    except OSError as error:
        raise PrincipleError(f"{path}: cannot be read ({error.strerror})") from None
    required = ("name", "statement", "question")
    allowed = {*required, "polarity"}
    if not isinstance(raw, dict):
        raise PrincipleError(f"{path}: must hold the keys name, statement, question")
    for key in required:
        if not isinstance(raw.get(key), str) or not raw[key].strip():
            raise PrincipleError(f"{path}: key '{key}' is missing or empty")
    unknown = sorted(set(raw) - allowed)
    if unknown:
        raise PrincipleError(
            f"{path}: unknown key '{unknown[0]}'; allowed: {', '.join(sorted(allowed))}"
        )
    if raw["name"] != path.stem:
        raise PrincipleError(
            f"{path}: name is '{raw['name']}' but the file is '{path.stem}'; make them equal"
        )
    if raw["name"].startswith("baseline_") or raw["name"] in RESERVED:
        raise PrincipleError(
            f"{path}: the name '{raw['name']}' is taken by a baseline; choose another"
        )
    polarity = raw.get("polarity", "high_is_good")
    if polarity not in ("high_is_good", "high_is_bad"):
        raise PrincipleError(
            f"{path}: polarity must be high_is_good or high_is_bad, not {polarity!r}"
        )
    return Principle(raw["name"], raw["statement"].strip(), raw["question"].strip(), polarity)
