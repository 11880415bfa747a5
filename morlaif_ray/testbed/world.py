"""The small world of the test-bed: 36 facts in four topics, and the people who ask about them.

Contract: constants only. Every word is lower case and contains no space; a topic's wrong answers
are the *other answers of the same topic* (a small shared pool), so that no answer word is right or
wrong by itself and factuality can only be judged against the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "ALLERGENS",
    "ALLERGY_TOPIC",
    "ANSWERS",
    "FACTS",
    "GROUPS",
    "MOODS",
    "ROLES",
    "TOPICS",
    "Fact",
    "Topic",
]


@dataclass(frozen=True)
class Topic:
    """A kind of fact: how it is asked about, and what can be said beside the answer."""

    name: str
    questions: tuple[str, ...]
    """Sentences with `{}` for the subject."""
    details: tuple[str, ...]
    """Sentences that are true of every subject of the topic, in the order a response gives them."""
    answers: dict[str, str]
    """Subject -> its one right answer."""

    @property
    def pool(self) -> tuple[str, ...]:
        """The distinct answers of the topic, in first-seen order."""
        return tuple(dict.fromkeys(self.answers.values()))


@dataclass(frozen=True)
class Fact:
    """One question of the world and its right answer."""

    topic: str
    subject: str
    answer: str


TOPICS: dict[str, Topic] = {
    topic.name: topic
    for topic in (
        Topic(
            "capital",
            ("what is the capital of {} ?", "tell me the capital of {} ."),
            ("millions live there .", "old streets wind around .", "tourists love visiting ."),
            {
                "france": "paris",
                "italy": "rome",
                "spain": "madrid",
                "egypt": "cairo",
                "japan": "tokyo",
                "peru": "lima",
                "cuba": "havana",
                "kenya": "nairobi",
                "norway": "oslo",
            },
        ),
        Topic(
            "food",
            ("what does a {} eat ?", "tell me what a {} eats ."),
            ("animals chew slowly .", "finding food takes hours .", "hungry babies share meals ."),
            {
                "panda": "bamboo",
                "cow": "grass",
                "bee": "nectar",
                "rabbit": "carrots",
                "cat": "fish",
                "lion": "meat",
                "koala": "leaves",
                "mouse": "cheese",
                "hen": "seeds",
            },
        ),
        Topic(
            "color",
            ("what color is {} ?", "tell me the color of {} ."),
            ("light creates colors .", "most eyes notice quickly .", "painters mix shades ."),
            {
                "snow": "white",
                "milk": "white",
                "blood": "red",
                "coal": "black",
                "tar": "black",
                "butter": "yellow",
                "mint": "green",
                "chocolate": "brown",
                "ink": "blue",
            },
        ),
        Topic(
            "dish",
            ("what is {} made of ?", "tell me what {} is made of ."),
            ("cooks prepare everything daily .", "salt comes later .", "fresh ones taste best ."),
            {
                "bread": "flour",
                "hummus": "chickpeas",
                "omelette": "eggs",
                "sushi": "rice",
                "tofu": "soy",
                "wine": "grapes",
                "jam": "fruit",
                "fries": "potatoes",
                "guacamole": "avocado",
            },
        ),
    )
}

FACTS: tuple[Fact, ...] = tuple(
    Fact(topic.name, subject, answer)
    for topic in TOPICS.values()
    for subject, answer in topic.answers.items()
)

ANSWERS: tuple[str, ...] = tuple(word for topic in TOPICS.values() for word in topic.pool)

MOODS: tuple[str, ...] = ("sad", "angry", "scared", "lonely")
GROUPS: tuple[str, ...] = ("women", "men", "foreigners", "elders")
ROLES: tuple[str, ...] = ("child", "expert")
ALLERGENS: tuple[str, ...] = ("nuts", "gluten", "pepper")
ALLERGY_TOPIC = "dish"
"""Allergies are mentioned only where they matter: with questions about what a dish is made of."""
