"""The JSON files of a published model's folder, which anybody may have made: read in bounds, held against bounds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from exvideo_train.errors import UserError
from exvideo_train.files import parse_json, read_regular, short

FETCH = "download the model folder again, or correct model.path"
# T5's tokenizer_config.json, the largest published one, has 20 kB; the indexes have up to 100.
_MAX_JSON_BYTES = 2 << 20
MAX_TEXT_LENGTH = 4096
"""Tokens a prompt; published models have 226. Attention over more takes gigabytes a caption."""
SCALING_FACTOR_BOUNDS = (1e-6, 1e6)
"""Those of published VAEs lie between 0.1 and 2; far outside, latents in float32 would be all zeros or infinite."""
# Fields with which a config asks for other code, files or number formats than its class has.
_FOREIGN_FIELDS = ("auto_map", "fusion_config", "quantization_config", "transformers_weights")


def read_config(path: Path) -> dict[str, Any]:
    """A JSON file of a model's folder that holds an object.

    Raises:
        UserError: it is missing, no regular file, too large, or no strict JSON object.
    """
    try:
        content = parse_json(read_regular(path, _MAX_JSON_BYTES))
    except ValueError as error:
        if isinstance(error, UserError):
            raise UserError(f"{error}; {FETCH}") from None
        raise UserError(f"{path}: is not JSON ({error}); {FETCH}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not an object; {FETCH}")
    return content


def check_class(fields: Mapping[str, Any], field: str, class_names: Collection[str | None], source: Path) -> None:
    """Refuse a config of another class than expected, or one that asks for more than its class.

    Raises:
        UserError: ``field`` is none of ``class_names``, or a field names other code, files or number formats.
    """
    if fields.get(field) not in class_names:
        names = ", ".join(filter(None, class_names))
        raise UserError(f"{source}: {field}={short(fields.get(field))} instead of {names}; correct model.path")
    for name in _FOREIGN_FIELDS:
        if fields.get(name):
            raise UserError(
                f"{source}: {name}={short(fields[name])} is not followed; use the published, unquantised model"
            )


def check_bounds(fields: Mapping[str, Any], bounds: Mapping[str, tuple[float, float]], source: Path | str) -> None:
    """Refuse sizes and factors that no model has; a field whose lowest value is an int must be one.

    Raises:
        UserError: a field that is there is no number of its range.
    """
    for name, (lowest, highest) in bounds.items():
        kinds = (int,) if isinstance(lowest, int) else (int, float)
        # type(), as True is an int too
        if name in fields and not (type(fields[name]) in kinds and lowest <= fields[name] <= highest):
            kind = "an integer" if kinds == (int,) else "a number"
            raise UserError(
                f"{source}: {name}={short(fields[name])} must be {kind} from {lowest:g} to {highest:g}; {FETCH}"
            )


def read_size(path: Path, name: str, highest: int) -> int:
    """One size of a config, which must have it.

    Raises:
        UserError: the file is broken, or the size is missing or out of bounds.
    """
    size = read_config(path).get(name)
    check_bounds({name: size}, {name: (1, highest)}, path)
    return int(size)  # type: ignore[arg-type]  # checked above
