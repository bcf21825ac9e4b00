"""Weights of one part of a published model, a folder that anybody may have made.

Only safetensors in the folder itself are opened: no pickles, and no file that an index names elsewhere. Their headers
are held against the network before a tensor is read. Links are followed: a hub's cache is made of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from exvideo_train.errors import UserError
from exvideo_train.files import short
from exvideo_train.models.config_file import FETCH, read_config
from exvideo_train.tensor_files import read_safetensors_header

_FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
_LONGEST_FILE_NAME = 255  # of the usual file systems, in bytes


def locate_tensors(folder: Path, stem: str) -> dict[str, Path]:
    """Which file holds each tensor, from the index or, where one file holds all, from its header.

    Args:
        stem: name of the weights before ``.safetensors``.

    Raises:
        UserError: no weights, several variants and no plain one, or an index that names a file that is not there or
            not in the folder.
    """
    index = _choose(folder, f"{stem}.safetensors.index.json", f"{stem}.safetensors.index.*.json")
    if index is not None:
        return _read_index(index)
    single = _choose(folder, f"{stem}.safetensors", f"{stem}.*.safetensors")
    if single is not None:
        return {name: single for name in read_safetensors_header(single) if name != "__metadata__"}
    hint = ""
    if any(folder.glob("*.bin")):
        hint = " (only pickled .bin files, which can run code when they are loaded: convert them to safetensors)"
    raise UserError(f"{folder}: holds neither {stem}.safetensors nor {stem}.safetensors.index.json{hint}; {FETCH}")


def _choose(folder: Path, plain: str, variants: str) -> Path | None:
    """The plain file if there is one, else the only variant of it (``fp16`` and the like)."""
    if (folder / plain).is_file():
        return folder / plain
    found = sorted(folder.glob(variants))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{folder}: holds several variants ({names}) and no {plain}; keep one of them")
    return found[0] if found else None


def _read_index(path: Path) -> dict[str, Path]:
    weight_map = read_config(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path}: is no safetensors index: weight_map={short(weight_map)}; {FETCH}")
    for name, file in weight_map.items():
        # Of its own folder and not hidden: what the fingerprint of a store covers.
        inside = isinstance(file, str) and file == Path(file).name and not file.startswith(".") and "\0" not in file
        if not inside or not file.endswith(".safetensors") or len(file.encode()) > _LONGEST_FILE_NAME:
            raise UserError(
                f"{path}: {short(name)} is in {short(file)}, which is no .safetensors file beside it; {FETCH}"
            )
    file_by_name = {name: path.parent / file for name, file in weight_map.items()}
    for file in sorted(set(file_by_name.values())):
        if not file.is_file():
            raise UserError(f"{file}: missing, though {path.name} names it; {FETCH}")
    return file_by_name


def check_tensors(folder: Path, parameters: Mapping[str, nn.Parameter], file_by_name: Mapping[str, Path]) -> None:
    """Compare names, shapes and kinds with the network, from the files' headers alone.

    Raises:
        UserError: anything missing, unexpected, misshaped or truncated.
    """
    if missing := sorted(parameters.keys() - file_by_name.keys()):
        raise UserError(
            f"{folder}: {_count(missing)} missing from the weights, though config.json asks for it; {FETCH}"
        )
    if unexpected := sorted(file_by_name.keys() - parameters.keys()):
        raise UserError(
            f"{file_by_name[unexpected[0]]}: {_count(unexpected)} not part of the network that config.json "
            f"describes; {FETCH}"
        )
    headers = {path: read_safetensors_header(path) for path in sorted(set(file_by_name.values()))}
    for name, path in file_by_name.items():
        entry = headers[path].get(name)
        if entry is None:
            raise UserError(f"{path}: {name} missing, though the index says it is here; {FETCH}")
        expected = list(parameters[name].shape)
        if entry["shape"] != expected:
            raise UserError(
                f"{path}: {name} has shape {short(entry['shape'])}, config.json makes it {expected}; {FETCH}"
            )
        if entry["dtype"] not in _FLOAT_DTYPES:
            raise UserError(
                f"{path}: {name} is stored as {entry['dtype']}, a quantised form; use the model's unquantised weights"
            )


def _count(names: list[str]) -> str:
    return short(names[0])[1:-1] if len(names) == 1 else f"{short(names[0])[1:-1]} and {len(names) - 1} more"


def read_tensors(file_by_name: Mapping[str, Path], device: torch.device | str = "cpu") -> Iterator[tuple[str, Tensor]]:
    """Each tensor once, memory-mapped on the CPU, file by file.

    Raises:
        UserError: a file cannot be read.
    """
    names_by_file: dict[Path, list[str]] = {}
    for name, path in file_by_name.items():
        names_by_file.setdefault(path, []).append(name)
    for path, names in names_by_file.items():
        try:
            with safe_open(path, framework="pt", device=str(device)) as shard:
                for name in names:
                    yield name, shard.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: cannot be read ({error}); {FETCH}") from error


def fill(model: nn.Module, folder: Path, stem: str, dtype: torch.dtype, device: torch.device | str) -> None:
    """Fill a network that is built on the meta device from the folder's weights, each tensor once.

    At no time do two copies of the weights exist. On the CPU in the stored dtype the parameters *are* the mapped file
    (private, copied on write), so that processes of one machine share its pages.

    Raises:
        UserError: anything missing, unexpected, misshaped or truncated, before any memory is taken.
    """
    file_by_name = locate_tensors(folder, stem)
    check_tensors(folder, dict(model.named_parameters()), file_by_name)
    for name, tensor in read_tensors(file_by_name, device):
        module_name, _, parameter_name = name.rpartition(".")
        parameter = nn.Parameter(tensor.to(device=device, dtype=dtype))
        setattr(model.get_submodule(module_name), parameter_name, parameter)
