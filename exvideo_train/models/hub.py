"""Where a model is: a local folder, or a hub id that is downloaded into the hub's own cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from exvideo_train.errors import UserError

_FILE_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_OFFLINE_HINT = (
    "on a machine with a network run `hf download {id}`, then copy the folder and set model.path to it, "
    "or set HF_HOME to a cache that holds it"
)


def is_hub_id(name: str) -> bool:
    """Whether it has the form ``owner/name``; a relative path of two parts has it too."""
    return _HUB_ID.fullmatch(name) is not None and not name.startswith(".")


def resolve_model_path(path: str | Path, revision: str | None, parts: Sequence[str]) -> Path:
    """The local folder of a model, downloaded if ``path`` is a hub id.

    A folder that exists is taken before a hub id of the same name. Downloads take safetensors, JSON and tokenizer
    files only, and only of the parts asked for: a training process needs no text encoder.

    Args:
        path: a folder in the published layout, or ``owner/name`` on the hub.
        revision: branch, tag or commit on the hub; the main branch if None.
        parts: folders of the model that will be read.

    Raises:
        UserError: nothing is there, a part is missing, or the hub cannot be reached and its cache does not help.
    """
    folder = Path(path).expanduser()
    if folder.exists():
        _check_parts(folder, parts)
        return folder
    hub_id = str(path)
    if not is_hub_id(hub_id):
        raise UserError(
            f"model.path={path}: no such folder, and not a hub id (owner/name); write a tiny model there with "
            f"`python -m exvideo_train.models.cogvideox.tiny {path}`, or correct it"
        )
    folder = _download(hub_id, revision, parts)
    _check_parts(folder, parts)
    return folder


def _check_parts(folder: Path, parts: Sequence[str]) -> None:
    if not folder.is_dir():
        raise UserError(f"model.path={folder}: a file; name the model's folder")
    if missing := [part for part in parts if not (folder / part).is_dir()]:
        raise UserError(
            f"model.path={folder}: has no {missing[0]}/ folder; name a folder in the published layout "
            f"({', '.join(f'{part}/' for part in parts)})"
        )


def _download(hub_id: str, revision: str | None, parts: Sequence[str]) -> Path:
    from huggingface_hub import errors as hub_errors
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # Configs tell every stage the family and the length of prompts; they are small, weights are not.
    patterns = [
        "model_index.json",
        "*/config.json",
        *(f"{part}/{pattern}" for part in parts for pattern in _FILE_PATTERNS),
    ]
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except GatedRepoError:
        raise UserError(
            f"model.path={hub_id}: asks for a licence; accept it on the hub, then `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"model.path={hub_id}: neither a local folder nor a model on the hub; correct it (a private model "
            "needs `hf auth login`)"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"model.revision={revision}: {hub_id} has no such branch, tag or commit; correct it") from None
    except HFValidationError as error:
        raise UserError(f"model.path={hub_id}: not a hub id ({error}); correct it") from None
    # The HTTP library's own base error, under whichever name this version of the hub's client uses it.
    except (HfHubHTTPError, hub_errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"model.path={hub_id}: no such local folder, and the hub could not be read ({reason}); "
            + _OFFLINE_HINT.format(id=hub_id)
        ) from error
