"""Where a model is: folders, hub ids, and a machine without a network."""

from __future__ import annotations

from pathlib import Path

import pytest

from exvideo_train.errors import UserError
from exvideo_train.models.cogvideox.family import COGVIDEOX
from exvideo_train.models.hub import resolve_model_path

PARTS = (*COGVIDEOX.training_parts, *COGVIDEOX.encoder_parts)


def test_a_folder_is_taken_as_it_is(pristine_5b: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model_path(str(pristine_5b), None, PARTS) == pristine_5b
    monkeypatch.chdir(pristine_5b.parent)
    assert resolve_model_path(pristine_5b.name, None, PARTS) == Path(pristine_5b.name)


def test_a_missing_part_is_named_unless_it_is_not_needed(model_folder: Path) -> None:
    (model_folder / "vae").rename(model_folder / "elsewhere")
    assert resolve_model_path(model_folder, None, COGVIDEOX.training_parts) == model_folder
    with pytest.raises(UserError, match="has no vae/ folder"):
        resolve_model_path(model_folder, None, PARTS)


@pytest.mark.parametrize("path", ["no/such/folder", "./owner/name", "name-alone", "/absolute/nowhere"])
def test_a_path_that_is_no_hub_id(path: str) -> None:
    with pytest.raises(UserError, match=r"model\.path=.*no such folder"):
        resolve_model_path(path, None, PARTS)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    file = tmp_path / "model"
    file.touch()
    with pytest.raises(UserError, match="a file; name the model's folder"):
        resolve_model_path(file, None, PARTS)


def test_offline_without_a_cache_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as caught:
        resolve_model_path("some-owner/some-model", "main", PARTS)
    for word in ("model.path=some-owner/some-model", "hf download some-owner/some-model", "HF_HOME"):
        assert word in str(caught.value)
