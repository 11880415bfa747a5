"""From the K scores of a response to one reward: normaliser, weights, scalarizers, and how good they are.

    raw scores_BK --Normaliser--> z_BK --weights, scalarizer--> reward_B        (`RewardFunction`)

| module | holds |
| --- | --- |
| `terms` | checks of scores and weights; orientation by sign |
| `scalarizers` | the seven formulas, `scalarize`, `SCALARIZERS` |
| `normaliser` | mean and std per principle on reference responses |
| `function` | `RewardFunction`, what PPO and evaluation call |
| `pairs` | the inputs of the fit: cached pair scores, the judge's log-odds |
| `regression` | logistic regression without intercept, bootstrap intervals, many refits at once |
| `weighting` | fitted, configured or unit weights |
| `bootstrap` | shares with intervals over prompts |
| `ablation` | principles removed one by one |
| `fit` | stage `4_reward` |
| `draws` | the offline sweep |

Contract: NumPy in and out, float64, no ray, no torch. Errors: `ScalarizerError` for scores and weights, `DataError` for
labels and pairs, `ConfigError` for `reward.weights`.
"""

from morlaif_ray.reward.draws import choose_best, evaluate_draws, make_draws
from morlaif_ray.reward.fit import RewardFit, fit_reward, write_reward
from morlaif_ray.reward.function import RewardFunction, RewardResult, configured_parameters
from morlaif_ray.reward.normaliser import Normaliser
from morlaif_ray.reward.pairs import PairScores, RewardInputs, read_reward_inputs
from morlaif_ray.reward.scalarizers import SCALARIZERS, Scalarizer, scalarize
from morlaif_ray.reward.terms import count_missing

__all__ = [
    "SCALARIZERS",
    "Normaliser",
    "PairScores",
    "RewardFit",
    "RewardFunction",
    "RewardInputs",
    "RewardResult",
    "Scalarizer",
    "choose_best",
    "configured_parameters",
    "count_missing",
    "evaluate_draws",
    "fit_reward",
    "make_draws",
    "read_reward_inputs",
    "scalarize",
    "write_reward",
]
