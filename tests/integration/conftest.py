"""Fixtures of the tests that start processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.trained import Trained


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model_5b: Path) -> Trained:
    """Runs of the tiny model on one, two and four ranks, made when first asked for."""
    return Trained(tmp_path_factory.mktemp("trained"), tiny_model_5b)
