"""PPO on scalarized rewards: pure functions, the learner, rollouts, and the SFT that comes before."""

from morlaif_ray.rl.controllers import AdaptiveKLController, RunningScale
from morlaif_ray.rl.functional import (
    explained_variance,
    gae,
    kl_penalty,
    place_rewards,
    ppo_policy_loss,
    ppo_value_loss,
)
from morlaif_ray.rl.learner import PPOLearner

__all__ = [
    "AdaptiveKLController",
    "PPOLearner",
    "RunningScale",
    "explained_variance",
    "gae",
    "kl_penalty",
    "place_rewards",
    "ppo_policy_loss",
    "ppo_value_loss",
]
