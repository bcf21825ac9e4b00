"""Which family a model is of: the one place that knows them by name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from exvideo_train.errors import UserError
from exvideo_train.files import short
from exvideo_train.geometry import Geometry
from exvideo_train.models.cogvideox.family import COGVIDEOX
from exvideo_train.models.config_file import read_config
from exvideo_train.models.family import Family

FAMILIES: list[Family[Any]] = [COGVIDEOX]
# Of files that name no family: they were made when there was one.
FIRST_FAMILY = COGVIDEOX.name


def family_named(name: Any, where: Path | str) -> Family[Any]:
    """The family that a file names; ``where`` is named in the error.

    Raises:
        UserError: there is none of that name.
    """
    for family in FAMILIES:
        if family.name == name:
            return family
    known = ", ".join(family.name for family in FAMILIES)
    raise UserError(f"{where}: family={short(name)} is not known here ({known}); use the version that wrote it")


def backbone_family(model_path: Path) -> Family[Any]:
    """The family of a published model folder, by ``_class_name`` of its network's config.

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


def encoders_family(model_path: Path) -> Family[Any]:
    """The family whose encoders a model folder holds; the network need not be there.

    Raises:
        UserError: it has no VAE's config, or one of a class that no family has.
    """
    for family in FAMILIES:
        if (model_path / family.subfolder / "config.json").is_file():
            return backbone_family(model_path)
    path = model_path / "vae" / "config.json"
    class_name = _class_name(path)
    for family in FAMILIES:
        if family.vae_class_name == class_name:
            return family
    known = ", ".join(family.vae_class_name for family in FAMILIES)
    raise UserError(f"{path}: _class_name={short(class_name)} is not supported; supported: {known}")


def _class_name(path: Path) -> Any:
    return read_config(path).get("_class_name")


def known_family(model: str) -> Family[Any] | None:
    """The family of ``model.path`` as it is given, if that can be told without a download.

    Raises:
        UserError: a folder that holds a model of no family.
    """
    path = Path(model).expanduser()
    for family in FAMILIES:
        if family.published_config(model) is not None:
            return family
        if any((path / part / "config.json").is_file() for part in (family.subfolder, "vae")):
            return encoders_family(path)
    return None


def likely_family(model: str) -> Family[Any]:
    """:func:`known_family`, or the first one, for a hub id of whose model only a download tells."""
    return known_family(model) or FAMILIES[0]


def known_licence(model: str) -> str:
    """The hub's short name of a model's licence; empty for a model that no family knows."""
    return next((family.licences[model] for family in FAMILIES if model in family.licences), "")


def check_geometries(geometries: Iterable[Geometry], model: str) -> None:
    """Refuse geometries that a model cannot take, as soon as its family is known.

    Args:
        model: ``model.path`` as given.

    Raises:
        UserError: names the option and the nearest values that it may have.
    """
    if family := known_family(model):
        for geometry in geometries:
            family.grid.check(geometry)


def backbone_config(model_path: Path) -> Any:
    """The config of the network in a published model folder, of its family's config class."""
    family = backbone_family(model_path)
    return family.read_config(model_path / family.subfolder)


def load_backbone(
    model_path: Path, dtype: torch.dtype, device: torch.device | str = "cpu", positions: str = "trained"
) -> nn.Module:
    """Load the network of a published model folder: see the family's ``load``.

    Args:
        positions: in time, of videos longer than the base model's; families without a choice have ``trained`` alone.

    Raises:
        UserError: anything missing, unexpected, misshaped or truncated; positions that the model cannot have.
    """
    family = backbone_family(model_path)
    network = family.load(model_path / family.subfolder, dtype, device)
    if positions != "trained":
        try:
            if not hasattr(network, "lay_out_time"):
                raise ValueError(f"{family.name} has no choice of positions")
            cast(Any, network).lay_out_time(positions)
        except ValueError as error:
            raise UserError(f"positions={positions}: {error}; use positions=trained or interpolated") from error
    return network
