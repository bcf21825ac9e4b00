"""Which backbone a model folder holds: the one place that knows them by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from exvideo_train.errors import UserError
from exvideo_train.files import short
from exvideo_train.models.cogvideox.family import COGVIDEOX
from exvideo_train.models.config_file import read_config
from exvideo_train.models.family import BackboneFamily

FAMILIES: tuple[BackboneFamily[Any], ...] = (COGVIDEOX,)


def backbone_family(model_path: Path) -> BackboneFamily[Any]:
    """The family of the network in a published model folder, by ``_class_name`` of its config.

    Raises:
        UserError: no folder, no network in it, or a network of a class that no family has.
    """
    if not model_path.is_dir():
        raise UserError(f"model.path={model_path}: no such folder; name a published model's folder or hub id")
    subfolders = dict.fromkeys(family.subfolder for family in FAMILIES)
    paths = [path for name in subfolders if (path := model_path / name / "config.json").is_file()]
    if not paths:
        places = " or ".join(f"{name}/config.json" for name in subfolders)
        raise UserError(f"model.path={model_path}: has no {places}; name a published model's folder or hub id")
    for path in paths:
        class_name = _class_name(path)
        for family in FAMILIES:
            if family.subfolder == path.parent.name and family.class_name == class_name:
                return family
    known = ", ".join(family.class_name for family in FAMILIES)
    raise UserError(f"{paths[0]}: _class_name={short(_class_name(paths[0]))} is not supported; supported: {known}")


def _class_name(path: Path) -> Any:
    return read_config(path).get("_class_name")


def backbone_config(model_path: Path) -> Any:
    """The config of the network in a published model folder, of its family's config class."""
    family = backbone_family(model_path)
    return family.read_config(model_path / family.subfolder)


def load_backbone(model_path: Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
    """Load the network of a published model folder: see the family's ``load``.

    Raises:
        UserError: anything missing, unexpected, misshaped or truncated.
    """
    family = backbone_family(model_path)
    return family.load(model_path / family.subfolder, dtype, device)
