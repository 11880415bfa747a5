"""Seeds derived by content, never by call order.

`derive_seed(run_seed, "pairs", prompt_id, 3)` is the same number in every process and every run, so a result does not
depend on which worker did the work, in which order, or how often it was repeated.
"""

from __future__ import annotations

import hashlib

SEED_BITS = 63  # torch.Generator and numpy both take a non-negative 63-bit integer


def stable_hash(*parts: object) -> str:
    """Hex SHA-256 of the parts. Parts are length-prefixed, so ("a", "bc") and ("ab", "c") differ."""
    digest = hashlib.sha256()
    for part in parts:
        raw = str(part).encode("utf-8", "surrogatepass")
        digest.update(f"{len(raw)}:".encode())
        digest.update(raw)
    return digest.hexdigest()


def derive_seed(*parts: object) -> int:
    """A seed in [0, 2**63) that depends on the parts alone."""
    return int(stable_hash(*parts)[:16], 16) % (1 << SEED_BITS)


def unit_interval(*parts: object) -> float:
    """A uniform number in [0, 1) that depends on the parts alone (for splits and random slots)."""
    return int(stable_hash(*parts)[:13], 16) / float(1 << 52)
