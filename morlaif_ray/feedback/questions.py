"""Which questions a set of pairs gives, and the content hash that identifies each one.

    pairs x (K principles + "general") x orders -> Question, in a fixed order that both driver and workers can rebuild

The key is a hash of what decides the answer and of nothing else: texts as shown, principle and phrase, judge, template.
Positions in a file never enter, so a shuffled, cut or extended data set finds its paid answers again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from morlaif_ray.feedback.client import Question
from morlaif_ray.feedback.joint import column_recipes, joint_groups
from morlaif_ray.principles import Principle
from morlaif_ray.seeding import derive_seed, stable_hash, unit_interval
from morlaif_ray.types import Order, ResponsePair

GENERAL = "general"
RANDOM = "random"
GENERAL_PHRASE = "All things considered, which response is better?"
KEY_BYTES = 16

Requests = list[tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class PairBatch:
    """A unit of work for one worker: consecutive pairs with all their questions."""

    index: int
    pairs: tuple[ResponsePair, ...]


@dataclass(frozen=True, slots=True)
class QuestionPlan:
    """What is asked of every pair. Small, picklable, the same on the driver and in every worker."""

    principles: tuple[tuple[str, str], ...]
    """(name, phrase) of the K principles and of "general", in column order."""
    orders: Literal["both", "random"]
    seed: int
    """Decides the slots where `orders` is "random"."""
    recipe: str
    """Hash of judge identity and template (`judges.recipe_for`)."""
    joint: int = 1
    """Principles per request (`feedback.joint`); "general" is always asked alone."""
    strengths: bool = False
    """Joint answers are numbers, not letters (`feedback.joint_answer`)."""

    @property
    def per_pair(self) -> int:
        """Questions per pair."""
        return len(self.principles) * (2 if self.orders == "both" else 1)

    def slots(self, pair_id: str) -> list[tuple[int, Order]]:
        """(column, order) of each question about a pair, in the fixed order of answers."""
        if self.orders == "both":
            columns = range(len(self.principles))
            return [(column, order) for order in ("ab", "ba") for column in columns]
        found: list[tuple[int, Order]] = []
        for group in joint_groups(self.principles, self.joint):
            # One slot per request; for a group of one the slot is the principle's own.
            leader = self.principles[group[0]][0]
            first = unit_interval(self.seed, "slot", pair_id, leader) < 0.5
            found += [(column, "ab" if first else "ba") for column in group]
        return found

    def questions(self, pair: ResponsePair) -> list[Question]:
        """The questions about one pair; those of one order stand together and share their prompt's prefix."""
        texts: dict[Order, tuple[str, str, str]] = {
            "ab": (pair.prompt, pair.response_a, pair.response_b),
            "ba": (pair.prompt, pair.response_b, pair.response_a),
        }
        digests = {order: stable_hash(*shown) for order, shown in texts.items()}
        recipes = column_recipes(self.recipe, self.principles, self.joint, self.strengths)
        found = []
        for column, order in self.slots(pair.pair_id):
            name, phrase = self.principles[column]
            prompt, first, second = texts[order]
            key = question_key(recipes[column], name, phrase, digests[order])
            found.append(
                Question(prompt, first, second, name, phrase, order, key, strength=self.strengths)
            )
        return found

    def batch_questions(self, batch: PairBatch) -> list[Question]:
        return [question for pair in batch.pairs for question in self.questions(pair)]

    def requests(self, questions: Sequence[Question], stored: Container[bytes]) -> Requests:
        """The requests for what is not stored: numbers of the questions that each of them answers.

        `questions` are those of whole pairs in plan order. A joint request is asked whole where any of its members is
        missing (a crash may have recorded the others): with fewer members it would be another question.
        """
        if self.joint == 1:
            return [(n,) for n, question in enumerate(questions) if question.key not in stored]
        groups = joint_groups(self.principles, self.joint)
        width = len(self.principles)
        requests = [
            tuple(start + column for column in group)
            for start in range(0, len(questions), width)
            for group in groups
        ]
        return [
            numbers
            for numbers in requests
            if any(questions[number].key not in stored for number in numbers)
        ]


def plan_questions(
    principles: Sequence[Principle],
    *,
    orders: Literal["both", "random"],
    seed: int,
    recipe: str,
    joint: int = 1,
    strengths: bool = False,
) -> QuestionPlan:
    """The K principles' phrases plus the overall question."""
    asked = [(principle.name, principle.question) for principle in principles]
    asked.append((GENERAL, GENERAL_PHRASE))
    return QuestionPlan(tuple(asked), orders, seed, recipe, joint, strengths)


def question_key(recipe: str, name: str, phrase: str, texts_digest: str) -> bytes:
    """16 bytes. Which response is shown first is part of `texts_digest`, so the two orders have two keys."""
    material = f"{recipe}\x00{name}\x00{phrase}\x00{texts_digest}".encode("utf-8", "surrogatepass")
    return hashlib.sha256(material).digest()[:KEY_BYTES]


def split_batches(
    pairs: Sequence[ResponsePair], plan: QuestionPlan, questions_per_batch: int
) -> Iterator[PairBatch]:
    """Consecutive pairs, about `questions_per_batch` questions each, at least one pair."""
    size = max(1, questions_per_batch // plan.per_pair)
    for index, start in enumerate(range(0, len(pairs), size)):
        yield PairBatch(index, tuple(pairs[start : start + size]))


def random_assignment(
    pairs: Sequence[ResponsePair], principles: Sequence[Principle], seed: int
) -> dict[str, str]:
    """pair_id -> the principle drawn for the "random" question (Constitutional AI's single objective)."""
    return {
        pair.pair_id: principles[
            derive_seed(seed, "random_principle", pair.pair_id) % len(principles)
        ].name
        for pair in pairs
    }
