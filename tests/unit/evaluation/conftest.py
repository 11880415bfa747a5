"""`write_synthetic_run` for the tests of this folder, and one run that it wrote."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from tests.unit.evaluation import synthetic_run


@pytest.fixture(scope="session")
def synthetic() -> ModuleType:
    return synthetic_run


@pytest.fixture(scope="session")
def whole_run(synthetic, tmp_path_factory) -> Path:
    """A run with every input there, on the test-bed. Tests read it and write elsewhere."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    synthetic.write_synthetic_run(run_dir)
    return run_dir
