"""Vectors of ALGORITHMS.md section 4, worked out by hand: two rows of four scores, and what becomes of them."""

from __future__ import annotations

import numpy as np

SCORES = np.array([[1.0, -0.5, 2.0, 0.3], [-1.2, 0.5, 0.6, -0.8]])
WEIGHTS = np.array([0.5, 1.0, 0.25, -0.5])
NORMALISED = [
    ("linear", [-1.5125, 1.4125]),
    ("worst_case", [-1.2, -0.6]),
    ("soft_max_min", [-0.62513, 0.116472]),
    ("uncertainty_weighted", [-0.64728, 0.110454]),
    ("lower_quantile", [-1.2, -0.6]),
    ("max_median", [-0.40625, 0.40625]),
    ("bernoulli_nash", [0.290661, 0.557843]),
]
"""Every scalarizer on these scores less (0, 0.1, 0.5, -0.2), divided by (1, 0.5, 2, 0.25)."""
