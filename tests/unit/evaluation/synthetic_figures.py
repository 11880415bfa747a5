"""What the synthetic run says: principles, weights, accuracies, and how each arm ends."""

from __future__ import annotations

from morlaif_ray.principles import PAPER_ORDER

PRINCIPLES = list(PAPER_ORDER)
WEIGHTS = (0.62, 0.31, 0.44, 0.35, -0.41, 0.37, 0.33, 0.21, 0.18, 0.29, 0.12, 0.03)
SCALARIZERS = {
    "linear": 0.662,
    "worst_case": 0.597,
    "soft_max_min": 0.631,
    "uncertainty_weighted": 0.655,
    "lower_quantile": 0.622,
    "max_median": 0.611,
    "bernoulli_nash": 0.648,
}
BASELINES = {
    "random_principle": 0.618,
    "general_principle": 0.633,
    "mean_log_odds": 0.604,
    "human_labels": 0.645,
}
ARM_SHAPES = {  # final reward gain (sd), final KL, oracle gain (sd), well-formed, words
    "linear": (1.55, 4.6, 0.95, 0.965, 15.5),
    "worst_case": (2.1, 9.8, -0.25, 0.71, 24.0),
    "soft_max_min": (1.3, 5.1, 0.7, 0.95, 14.2),
    "uncertainty_weighted": (1.1, 3.9, 0.5, 0.958, 16.4),
    "lower_quantile": (1.2, 5.5, 0.35, 0.93, 12.1),
    "max_median": (0.9, 3.1, 0.4, 0.972, 13.4),
    "bernoulli_nash": (1.4, 5.0, 0.8, 0.951, 15.1),
    "single_pm": (1.8, 5.6, 0.45, 0.955, 18.8),
}
HUMAN = "\n\nHuman: i am sad . my friend says the sun is green . is the sun green ?\n\nAssistant:"
UNSAFE = "<script>alert('x')</script> & <img src=http://example.org/x.png onerror=alert(1)>"
