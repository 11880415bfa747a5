"""The whole config, and the checks that need more than one section."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from morlaif_ray.config.base import NonNegativeInt, Section
from morlaif_ray.config.inputs import (
    DataConfig,
    FileSource,
    HubSource,
    ModelConfig,
    PairsConfig,
    ScratchModel,
    SftConfig,
)
from morlaif_ray.config.judging import FeedbackConfig, RulesJudge
from morlaif_ray.config.learning import (
    EvaluationConfig,
    PolicyConfig,
    RewardConfig,
    SweepConfig,
)
from morlaif_ray.config.operations import ClusterConfig, TrackingConfig
from morlaif_ray.config.preferring import PreferenceConfig

OPERATIONAL_SECTIONS = ("cluster", "tracking", "description")
"""Sections that change no result and so never make a stage stale."""


class Config(Section):
    """Everything a run needs. `configs/` holds worked examples."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9_.-]{1,60}$")
    description: str = ""
    seed: NonNegativeInt = 0
    data: DataConfig = DataConfig()
    model: ModelConfig = ScratchModel()
    sft: SftConfig = SftConfig()
    pairs: PairsConfig = PairsConfig()
    feedback: FeedbackConfig = FeedbackConfig()
    preference: PreferenceConfig = PreferenceConfig()
    reward: RewardConfig = RewardConfig()
    policy: PolicyConfig = PolicyConfig()
    sweep: SweepConfig = SweepConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def on_testbed(self) -> bool:
        return self.data.source.kind == "testbed"

    @model_validator(mode="after")
    def _testbed_pieces_agree(self) -> Config:
        judge = self.feedback.judge
        if isinstance(judge, RulesJudge) and judge.measures == "testbed" and not self.on_testbed:
            raise ValueError(
                "feedback.judge.measures is 'testbed' but data.source.kind is "
                f"'{self.data.source.kind}'; write measures: lexical, or use another judge"
            )
        if self.evaluation.judge == "oracle" and not self.on_testbed:
            raise ValueError(
                "evaluation.judge is 'oracle', which only knows test-bed dialogues; write judge: training"
            )
        if self.on_testbed and self.pairs.kind == "dataset":
            raise ValueError(
                "pairs.kind is 'dataset' but the test-bed has prompts only; write pairs.kind: sample"
            )
        return self

    @model_validator(mode="after")
    def _responses_leave_room_for_prompts(self) -> Config:
        for section, num in (
            ("pairs", self.pairs.max_new_tokens),
            ("policy", self.policy.max_new_tokens),
        ):
            if num >= self.model.max_length:
                raise ValueError(
                    f"{section}.max_new_tokens {num} leaves no room for a prompt within model.max_length "
                    f"{self.model.max_length}; lower it or raise model.max_length"
                )
        return self

    @model_validator(mode="after")
    def _arms_have_their_baselines(self) -> Config:
        for arm in self.policy.arms:
            if arm.baseline is not None and arm.baseline not in self.preference.baselines:
                raise ValueError(
                    f"policy.arms: arm '{arm.name}' uses baseline '{arm.baseline}', which is not in "
                    f"preference.baselines; add it there"
                )
        if self.evaluation.matrix_arms != "all":
            known = {arm.name for arm in self.policy.arms}
            for name in self.evaluation.matrix_arms:
                if name not in known:
                    raise ValueError(
                        f"evaluation.matrix_arms names '{name}', which is no arm; "
                        f"arms are {', '.join(sorted(known))}"
                    )
        return self

    def result_sections(self) -> dict[str, Any]:
        """All sections that can change a result, as plain JSON values."""
        plain = self.result_part()
        return {key: value for key, value in plain.items() if key not in OPERATIONAL_SECTIONS}


def _operational_keys() -> frozenset[str]:
    sections = {name: info.annotation for name, info in Config.model_fields.items()}
    return frozenset(
        f"{name}.{key}"
        for name, section in sections.items()
        if isinstance(section, type) and issubclass(section, Section)
        for key in section.operational
    )


OPERATIONAL_KEYS = _operational_keys()
"""Keys within other sections that change no result, e.g. `policy.call_timeout_s`."""

__all__ = ["OPERATIONAL_KEYS", "OPERATIONAL_SECTIONS", "Config", "FileSource", "HubSource"]
