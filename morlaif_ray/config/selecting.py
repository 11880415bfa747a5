"""`feedback.select`: which pairs of split `preference` are asked about. Weights and test are always asked in full."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from morlaif_ray.config.base import PositiveInt, Section


class SelectAll(Section):
    """Every pair."""

    kind: Literal["all"] = "all"


class SelectRandom(Section):
    """A seeded sample: the baseline of active selection, and the way to pay for fewer judgements."""

    kind: Literal["random"] = "random"
    num_pairs: PositiveInt


class SelectByDisagreement(Section):
    """Asks next about the pairs on which a bootstrap ensemble of PMs disagrees most (Christiano et al. 2017)."""

    kind: Literal["ensemble_disagreement"] = "ensemble_disagreement"
    num_pairs: PositiveInt
    """Pairs to ask about in all, the seed set included."""
    rounds: Annotated[int, Field(ge=2)] = 4
    """Equal shares of `num_pairs`; the first is drawn at random, every later one by an ensemble of what came before."""
    ensemble_size: Annotated[int, Field(ge=2, le=16)] = 4
    """Members. They are heads of one trunk, so their number costs next to nothing."""

    @model_validator(mode="after")
    def _a_pair_per_round(self) -> SelectByDisagreement:
        if self.num_pairs < self.rounds:
            raise ValueError(
                f"num_pairs ({self.num_pairs}) is less than rounds ({self.rounds}), so a round would ask nothing; "
                f"lower rounds or raise num_pairs"
            )
        return self


SelectionConfig = Annotated[
    SelectAll | SelectRandom | SelectByDisagreement, Field(discriminator="kind")
]
