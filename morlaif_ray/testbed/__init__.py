"""The test-bed: self-written dialogues whose true quality is known.

    make_prompts -> sample_response -> read_response -> principle_scores -> human_utility
                                                                         -> oracle_log_odds

Contract: pure functions of their arguments, standard library only. Any text has a true score on
each of the 12 principles, so what a policy really does can be told from what a reward model says
that it does. The truth must stay out of sight of training code; only judges and evaluation ask.

| module | holds |
| --- | --- |
| `world` | the facts, moods, groups and backgrounds |
| `prompts` | drawing, writing and reading prompts |
| `grammar` | the parts of a response, its sentences, the corpus, the vocabulary |
| `reader` | parts and flaws of any text |
| `truth` | the score on each principle |
| `judge` | human utility and preference, the oracle's log-odds |
"""

from morlaif_ray.testbed.grammar import ResponseParts, sample_response, vocabulary
from morlaif_ray.testbed.judge import (
    GENERAL_WEIGHTS,
    HUMAN_TEMPERATURE,
    HUMAN_WEIGHTS,
    HumanLabel,
    human_preference,
    human_utility,
    oracle_log_odds,
)
from morlaif_ray.testbed.prompts import PromptAttributes, make_prompts, max_prompts, read_prompt
from morlaif_ray.testbed.reader import ResponseAttributes, read_response
from morlaif_ray.testbed.truth import PRINCIPLES, principle_scores

__all__ = [
    "GENERAL_WEIGHTS",
    "HUMAN_TEMPERATURE",
    "HUMAN_WEIGHTS",
    "PRINCIPLES",
    "HumanLabel",
    "PromptAttributes",
    "ResponseAttributes",
    "ResponseParts",
    "human_preference",
    "human_utility",
    "make_prompts",
    "max_prompts",
    "oracle_log_odds",
    "principle_scores",
    "read_prompt",
    "read_response",
    "sample_response",
    "vocabulary",
]
