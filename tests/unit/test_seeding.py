"""Seeds depend on content alone."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from morlaif_ray.seeding import derive_seed, stable_hash, unit_interval

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("error")]


def test_the_hash_is_sha256_of_length_prefixed_parts() -> None:
    # sha256(b"1:a2:bc")
    import hashlib

    assert stable_hash("a", "bc") == hashlib.sha256(b"1:a2:bc").hexdigest()
    assert stable_hash("é") == hashlib.sha256("2:é".encode()).hexdigest()


def test_parts_do_not_run_together() -> None:
    assert (
        len({stable_hash(*p) for p in [("a", "bc"), ("ab", "c"), ("abc",), ("a", "b", "c")]}) == 4
    )
    assert stable_hash() != stable_hash("")


def test_a_lone_surrogate_can_be_hashed() -> None:
    assert len(stable_hash("\ud83d")) == 64


def test_a_seed_is_the_same_in_every_process() -> None:
    code = "from morlaif_ray.seeding import derive_seed; print(derive_seed(3, 'pairs', 'id', 2))"
    run = [sys.executable, "-c", code]
    other = subprocess.run(
        run, capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"}
    )
    assert int(other.stdout) == derive_seed(3, "pairs", "id", 2)


def test_seeds_fit_every_generator() -> None:
    import torch

    seeds = [derive_seed("seed", i) for i in range(2000)]
    assert len(set(seeds)) == 2000
    assert all(0 <= seed < 2**63 for seed in seeds)
    np.random.default_rng(max(seeds))
    torch.Generator().manual_seed(max(seeds))


def test_the_unit_interval_is_uniform_and_never_one() -> None:
    values = np.array([unit_interval("split", i) for i in range(5000)])
    assert values.min() >= 0.0
    assert values.max() < 1.0
    counts, _ = np.histogram(values, bins=10, range=(0.0, 1.0))
    assert (
        float(((counts - 500) ** 2 / 500).sum()) < 28.0
    )  # 9 degrees of freedom: one in a thousand
