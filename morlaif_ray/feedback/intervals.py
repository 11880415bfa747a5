"""95% intervals in closed form: exact enough for counts of thousands, and free where a bootstrap would cost minutes.

Contract: pure functions; without enough data every field is NaN and `num` says how much there was.
"""

from __future__ import annotations

import math

import numpy as np

from morlaif_ray.types import FloatArray, Interval

Z_95 = 1.959963984540054
NAN = float("nan")


def wilson_interval(successes: float, num: int) -> Interval:
    """A share with its 95% Wilson score interval; all NaN for num = 0."""
    if num == 0:
        return Interval(NAN, NAN, NAN, 0)
    share = successes / num
    z2 = Z_95**2
    centre = (share + z2 / (2 * num)) / (1 + z2 / num)
    half = Z_95 / (1 + z2 / num) * math.sqrt(share * (1 - share) / num + z2 / (4 * num**2))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half), num)


def normal_interval(values_N: FloatArray) -> Interval:
    """Mean of the present values +- 1.96 standard errors; no ends below 2 values."""
    present = values_N[~np.isnan(values_N)]
    num = len(present)
    if num == 0:
        return Interval(NAN, NAN, NAN, 0)
    mean = float(present.mean())
    if num < 2:
        return Interval(mean, NAN, NAN, num)
    half = Z_95 * float(present.std(ddof=1)) / math.sqrt(num)
    return Interval(mean, mean - half, mean + half, num)


def fisher_interval(correlation: float, num: int) -> Interval:
    """A Pearson correlation with its interval by Fisher's z; no ends below 4 pairs or at +-1."""
    if math.isnan(correlation):
        return Interval(NAN, NAN, NAN, num)
    if num < 4 or abs(correlation) >= 1.0:
        return Interval(correlation, NAN, NAN, num)
    z, half = math.atanh(correlation), Z_95 / math.sqrt(num - 3)
    return Interval(correlation, math.tanh(z - half), math.tanh(z + half), num)
