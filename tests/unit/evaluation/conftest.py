"""`write_synthetic_run` for the tests of this folder (tests are no packages: the file is loaded by its path)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


def load_synthetic_run() -> ModuleType:
    path = Path(__file__).with_name("synthetic_run.py")
    spec = importlib.util.spec_from_file_location("synthetic_run", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def synthetic() -> ModuleType:
    return load_synthetic_run()


@pytest.fixture(scope="session")
def whole_run(synthetic, tmp_path_factory) -> Path:
    """A run with every input there, on the test-bed. Tests read it and write elsewhere."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    synthetic.write_synthetic_run(run_dir)
    return run_dir
