"""A tiny model's transformer folder that a test may damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from exvideo_train.models.cogvideox.tiny import write_tiny_model


@pytest.fixture(scope="session")
def pristine_5b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("backbones") / "5b", "5b")


@pytest.fixture(scope="session")
def pristine_2b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("backbones") / "2b", "2b")


@pytest.fixture
def model_folder(pristine_5b: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine_5b, tmp_path / "model"))
