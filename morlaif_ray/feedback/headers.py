"""What a provider's rate-limit headers say: allowed per minute, what is left, when it is full again.

    x-ratelimit-limit-requests: 6000    x-ratelimit-remaining-requests: 5999    x-ratelimit-reset-requests: 10ms
    x-ratelimit-limit-tokens: 150000    x-ratelimit-remaining-tokens: 149984    x-ratelimit-reset-tokens: 6m0s

Pure reading; what to do about it is decided by `rate.learn`. A header that cannot be read counts as absent.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True, slots=True)
class Allowance:
    """One limited quantity (requests or tokens). None: the provider did not say."""

    limit: float | None = None
    """Per minute where `reset_s` is at most a minute, else per some longer time."""
    remaining: float | None = None
    reset_s: float | None = None
    """Seconds until all of `limit` is free again."""


@dataclass(frozen=True, slots=True)
class RateHints:
    requests: Allowance = Allowance()
    tokens: Allowance = Allowance()


@runtime_checkable
class ReportsLimits(Protocol):
    """A client that keeps what the last response said about its limits."""

    def limits(self) -> RateHints | None:
        """The newest hints since the last call; None where there are none."""
        ...


def read_hints(headers: Mapping[str, str]) -> RateHints | None:
    """The hints of one response; None where it carries none (most own servers)."""
    requests, tokens = (_allowance(headers, what) for what in ("requests", "tokens"))
    if requests == tokens == Allowance():
        return None
    return RateHints(requests, tokens)


def _allowance(headers: Mapping[str, str], what: str) -> Allowance:
    return Allowance(
        _number(headers.get(f"x-ratelimit-limit-{what}")),
        _number(headers.get(f"x-ratelimit-remaining-{what}")),
        duration_s(headers.get(f"x-ratelimit-reset-{what}")),
    )


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return value if 0.0 <= value < math.inf else None


def duration_s(text: str | None) -> float | None:
    """Seconds of "1m30.5s", "12ms" or "3.5"; None where it is neither."""
    if text is None:
        return None
    plain = _number(text)
    if plain is not None:
        return plain
    parts = _PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text.strip():
        return None
    return sum(float(number) * _UNIT_S[unit] for number, unit in parts)
