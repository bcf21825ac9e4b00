"""Files onto the hub, in one commit."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from exvideo_train.errors import UserError
from exvideo_train.models.hub import is_hub_id


def check_push(repo: str) -> None:
    """Before anything is written.

    Raises:
        UserError: it is no ``owner/name``.
    """
    if not is_hub_id(repo):
        raise UserError(f"push={repo}: must be owner/name, as on the hub")


def push(files: Sequence[Path], repo: str, private: bool) -> str:
    """Make the repository if it is not there, and upload files of one folder; returns its address.

    Raises:
        UserError: not logged in, not allowed, or the hub cannot be reached; the files stay where they are.
    """
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub_errors

    (folder,) = {path.parent for path in files}
    api = HfApi()
    try:
        address = api.create_repo(repo, repo_type="model", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            repo_type="model",
            folder_path=folder,
            allow_patterns=[glob.escape(path.name) for path in files],
            commit_message=f"{files[0].name} of exvideo-train",
        )
    # The HTTP library's own base error, under whichever name this version of the hub's client uses it.
    except (hub_errors.HfHubHTTPError, hub_errors.HTTPError, OSError, ValueError) as error:  # type: ignore[attr-defined]
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"push={repo}: not uploaded ({reason}); the files stay in {folder}: `hf auth login`, then export again"
        ) from error
    return str(address)
