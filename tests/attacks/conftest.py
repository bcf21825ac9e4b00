import shutil
from pathlib import Path

import pytest
from support.attacked_store import write_six_clips

from exvideo_train.latents.store import LatentStore


@pytest.fixture(scope="session")
def whole_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six clips; read only."""
    path = tmp_path_factory.mktemp("whole") / "store"
    write_six_clips(path)
    return path


@pytest.fixture
def store(whole_store: Path, tmp_path: Path) -> LatentStore:
    """A copy to attack, beside a folder ``outside`` with a file that nobody may touch."""
    shutil.copytree(whole_store, tmp_path / "store")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious.txt").write_text("precious")
    return LatentStore.open(tmp_path / "store")
