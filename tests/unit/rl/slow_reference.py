"""PPO's arithmetic once more, as plain Python loops over plain numbers: slow, readable, independent of torch.

A response is a list of per-token numbers of its own length; there is no padding and no mask. Formulas: ALGORITHMS.md
section 5 and the papers named in `morlaif_ray/rl`.
"""

from __future__ import annotations

import math

Rows = list[list[float]]


def kl_terms(logprobs: list[float], ref_logprobs: list[float], estimator: str) -> list[float]:
    made = []
    for ours, theirs in zip(logprobs, ref_logprobs, strict=True):
        difference = ours - theirs
        made.append(difference if estimator == "k1" else math.exp(-difference) - 1.0 + difference)
    return made


def token_rewards(kl: list[float], score: float, beta: float) -> list[float]:
    rewards = [-beta * term for term in kl]
    rewards[-1] += score
    return rewards


def gae_row(
    rewards: list[float], values: list[float], gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    """A_t as the discounted sum of one-step errors; returns A_t + V_t."""
    advantages = []
    for t in range(len(rewards)):
        total, factor = 0.0, 1.0
        for k in range(t, len(rewards)):
            following = values[k + 1] if k + 1 < len(values) else 0.0
            total += factor * (rewards[k] + gamma * following - values[k])
            factor *= gamma * lam
        advantages.append(total)
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def whiten(rows: Rows) -> Rows:
    flat = [value for row in rows for value in row]
    mean = sum(flat) / len(flat)
    variance = sum((value - mean) ** 2 for value in flat) / len(flat)
    return [[(value - mean) / math.sqrt(variance + 1e-8) for value in row] for row in rows]


def rloo_totals(totals: list[float], n: int) -> list[float]:
    made = []
    for index, total in enumerate(totals):
        start = index // n * n
        others = [totals[j] for j in range(start, start + n) if j != index]
        made.append(total - sum(others) / len(others))
    return made


def grpo_totals(totals: list[float], n: int) -> list[float]:
    made = []
    for index, total in enumerate(totals):
        start = index // n * n
        group = totals[start : start + n]
        mean = sum(group) / n
        std = math.sqrt(sum((x - mean) ** 2 for x in group) / (n - 1))
        made.append((total - mean) / (std + 1e-4))
    return made


def importance_weights(old: list[float], engine: list[float], cap: float) -> list[float]:
    return [min(math.exp(o - e), cap) for o, e in zip(old, engine, strict=True)]


def policy_loss(
    logprobs: Rows, old: Rows, advantages: Rows, weights: Rows, clip: float
) -> tuple[float, float, float]:
    """(loss, approx_kl, clipfrac), means over all tokens."""
    loss = kl = clipped = 0.0
    num = 0
    for i, row in enumerate(logprobs):
        for t, logprob in enumerate(row):
            ratio = math.exp(logprob - old[i][t])
            near = min(max(ratio, 1.0 - clip), 1.0 + clip)
            plain, limited = -advantages[i][t] * ratio, -advantages[i][t] * near
            loss += weights[i][t] * max(plain, limited)
            kl += ratio - 1.0 - (logprob - old[i][t])
            clipped += 1.0 if limited > plain else 0.0
            num += 1
    return loss / num, kl / num, clipped / num


def value_loss(values: Rows, old: Rows, returns: Rows, clip: float) -> float:
    total, num = 0.0, 0
    for i, row in enumerate(values):
        for t, value in enumerate(row):
            near = old[i][t] + min(max(value - old[i][t], -clip), clip)
            total += 0.5 * max((value - returns[i][t]) ** 2, (near - returns[i][t]) ** 2)
            num += 1
    return total / num
