"""Every figure that a PPO step can report, with its unit: what trackers log and Prometheus exports.

Beside these: the fields of `UpdateMetrics`, and `raw_<principle>`, `norm_<principle>`. Prometheus names are
`ray_morlaif_<name>`, labelled with the arm. `docs/grafana/morlaif.json` shows them.
"""

from __future__ import annotations

OBSERVED = {
    "reward_std": "standard deviation of the scalar reward over the step's responses",
    "oracle_utility": "true utility of the responses (test-bed only)",
    "well_formed_share": "share of well-formed responses (test-bed only)",
}
SECONDS = {
    "seconds_generate": "wall seconds of sampling",
    "seconds_score": "wall seconds of the panel and the scalarizer",
    "seconds_update": "wall seconds of the learner's step",
    "seconds_refresh": "wall seconds until every rollout worker held the new weights",
    "seconds_wait_rollouts": "wall seconds in which the learner waited for responses",
    "seconds_step": "wall seconds of the whole step",
}
GAUGES = {
    "generated_tokens_per_second": "response tokens per second of sampling",
    "learner_idle_share": "share of the step in which the learner did not update",
    "staleness": "policy versions between sampling and the update",
    "rollouts_ready": "1 where the next batch lay ready when the learner asked, else 0",
    "parity_gap_max": "largest difference of a token's log-probability, engine against learner (nats)",
    "parity_gap_mean": "mean of the same",
    "parity_alarms": "times that the largest difference was above policy.parity_threshold",
}
"""Of modes and versions of the loop that measure them."""
DESCRIPTIONS = {**OBSERVED, **SECONDS, **GAUGES}
PER_PRINCIPLE = ("raw_", "norm_")


def is_known(name: str, principles: tuple[str, ...]) -> bool:
    """Whether a PPO step can report this name."""
    from dataclasses import fields

    from morlaif_ray.types import UpdateMetrics

    if name in DESCRIPTIONS or name in {field.name for field in fields(UpdateMetrics)}:
        return True
    return any(
        name == f"{prefix}{principle}" for prefix in PER_PRINCIPLE for principle in principles
    )
