"""Which videos are asked for: prompts, seeds and sizes, from options or from files."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exvideo_train.config.commands import Sample
from exvideo_train.errors import UserError
from exvideo_train.files import parse_json, read_regular, short
from exvideo_train.geometry import Geometry

PROMPT_SETS = Path(__file__).parent / "prompts"
_MAX_FILE_BYTES = 64 << 20
_SLUG_LETTERS = 40
# What a line of a .jsonl file may say, and of which type it is.
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "prompt": str,
    "negative_prompt": str,
    "seed": int,
    "num_frames": int,
    "height": int,
    "width": int,
    "fps": (int, float),
    "image": str,
}


@dataclass(frozen=True)
class VideoRequest:
    """One video, of every variant.

    Args:
        negative_prompt: what it is guided away from.
        seed: of its noise.
        image: the picture that it begins with.
    """

    prompt: str
    negative_prompt: str
    seed: int
    geometry: Geometry
    image: Path | None = None

    @property
    def stem(self) -> str:
        """Name of its files: the prompt's first words, a digest of all that it is made of, and the seed."""
        words = re.sub(r"[^\w]+", "_", self.prompt.lower()).strip("_")
        # File systems count bytes: 255 of them, and other alphabets take up to four a letter.
        words = words[:_SLUG_LETTERS].encode()[: 2 * _SLUG_LETTERS].decode(errors="ignore").strip("_")
        whole = "\n".join([self.prompt, self.negative_prompt, self.geometry.name, str(self.image or "")])
        return "-".join(filter(None, [words, hashlib.sha256(whole.encode()).hexdigest()[:8], f"seed{self.seed}"]))


def read_requests(config: Sample) -> list[VideoRequest]:
    """What the options ask for, each video once, the seeds of a prompt side by side.

    Raises:
        UserError: not exactly one source of prompts, a file that cannot be read, or a line that is no prompt; the
            message names the file and the line.
    """
    given = {
        "prompt": config.prompt is not None,
        "prompts_file": config.prompts_file is not None,
        "prompt_set": config.prompt_set is not None,
    }
    named = [name for name, is_given in given.items() if is_given]
    image = Path(config.image) if config.image else None
    if len(named) > 1 or (not named and image is None):
        what = f"{' and '.join(named)} are given" if named else "none is given"
        raise UserError(f'{what} of {", ".join(given)}; give one of them, like prompt="..."')
    if config.prompts_file is not None:
        path, option = Path(config.prompts_file), "prompts_file"
        rows = _rows(path, option)
    elif config.prompt_set is not None:
        path, option = PROMPT_SETS / f"{config.prompt_set.value}.txt", "prompt_set"
        rows = _rows(path, option)
    else:
        rows = iter([("", {"prompt": config.prompt or ""})])
    requests = [
        request
        for where, row in rows
        for number in range(config.seeds)
        for request in [_request(config, image, where, row, number)]
    ]
    if not requests:
        raise UserError(f"{option}={path}: holds no prompt; write one a line")
    unique = list(dict.fromkeys(requests))
    if len(unique) < len(requests):
        print(f"note: {len(requests) - len(unique)} of {len(requests)} videos are asked for twice; each is made once")
    return unique


def _rows(path: Path, option: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place in the file, for messages; what the line says) of each line that is not empty."""
    try:
        text = read_regular(path, _MAX_FILE_BYTES).decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{option}={path}: {error.strerror}; name a text file with a prompt a line") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{option}={path}: not UTF-8 text ({error}); save it as UTF-8") from error
    for number, line in enumerate(text.splitlines(), 1):
        where = f"{option}={path}: line {number}"
        if not line.strip():
            continue
        yield where, _json_row(where, line) if path.suffix == ".jsonl" else {"prompt": line.strip()}


def _json_row(where: str, line: str) -> Mapping[str, Any]:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise UserError(f'{where}: no JSON ({error}); write an object like {{"prompt": "..."}}') from error
    if not isinstance(row, dict) or ("prompt" not in row and "image" not in row):
        raise UserError(f'{where}: must be an object with a prompt, like {{"prompt": "...", "seed": 6}}')
    for name, value in row.items():
        if name not in _FIELDS:
            raise UserError(f"{where}: has {short(name)}, which means nothing here; known are {', '.join(_FIELDS)}")
        if not isinstance(value, _FIELDS[name]) or isinstance(value, bool):
            kind = "text" if _FIELDS[name] is str else "a number" if name == "fps" else "a whole number"
            raise UserError(f"{where}: {name}={short(value)} must be {kind}")
    return row


def _request(config: Sample, image: Path | None, where: str, row: Mapping[str, Any], number: int) -> VideoRequest:
    seed = row.get("seed", config.seed) + number
    try:
        if not 0 <= seed < 2**63:
            raise UserError(f"seed={seed}: must be between 0 and 2**63 - 1")
        values = {name: row.get(name, getattr(config, name)) for name in ("num_frames", "height", "width", "fps")}
        geometry = Geometry(**values | {"fps": float(values["fps"])})
    except UserError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from error
    if "image" in row:
        image = Path(config.prompts_file or "").parent / row["image"]
    return VideoRequest(
        row.get("prompt", ""), row.get("negative_prompt", config.negative_prompt), seed, geometry, image
    )
