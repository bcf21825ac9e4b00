"""What lies below a store's folder: nothing is followed through a link, and what is damaged moves aside.

The store's own folder may be a link: whoever names it has chosen where it leads. A link below it leads wherever the
store's author wanted, and who verifies, trains or encodes would read, move or write files that are no part of it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from exvideo_train.errors import UnreadableFile, UserError
from exvideo_train.locks import hold

DAMAGED_FOLDER = "damaged"
LINK_REMEDY = "put the file or folder itself there, or mount it there"
UNREADABLE_REMEDY = "it is left as it is: make it readable (permissions, disk, network mount)"
_LINKS_NAMED = 5


def check_inside(root: Path, path: Path) -> None:
    """Check that a path below ``root`` exists and no part of it is a link.

    Raises:
        FileNotFoundError: it does not exist.
        UnreadableFile: a part is a link, or cannot be looked at.
    """
    part = root
    for name in path.relative_to(root).parts:
        part = part / name
        try:
            mode = os.lstat(part).st_mode
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(f"{part} does not exist") from None
        except OSError as error:
            raise UnreadableFile(f"{part} cannot be looked at ({error.strerror}); {UNREADABLE_REMEDY}") from error
        if stat.S_ISLNK(mode):
            raise UnreadableFile(f"{part} is a link, which is not followed; {LINK_REMEDY}")


def exists_inside(root: Path, path: Path) -> bool:
    """Whether a path below ``root`` exists, without a link in it.

    Raises:
        UnreadableFile: a part is a link, or cannot be looked at.
    """
    try:
        check_inside(root, path)
    except FileNotFoundError:
        return False
    return True


def list_folder(root: Path, folder: Path) -> list[os.DirEntry[str]]:
    """What a folder below ``root`` holds, sorted by name, without what is hidden; nothing if there is no folder.

    Raises:
        UnreadableFile: it is a link, lies below one, or cannot be listed.
    """
    if not exists_inside(root, folder):
        return []
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UnreadableFile(f"{folder} cannot be listed ({error.strerror}); {UNREADABLE_REMEDY}") from error


def is_folder(entry: os.DirEntry[str]) -> bool:
    """A folder itself, not a link to one."""
    return entry.is_dir(follow_symlinks=False)


def refuse_links(root: Path, folders: Iterable[Path]) -> None:
    """Refuse links among what folders of a store hold, before anything is written below them.

    Raises:
        UserError: names the first links.
    """
    links = [entry.path for folder in folders for entry in list_folder(root, folder) if entry.is_symlink()]
    if links:
        raise UserError(
            f"latents={root}: {len(links)} link(s) in the store, which are not followed "
            f"({', '.join(map(repr, links[:_LINKS_NAMED]))}); {LINK_REMEDY}"
        )


def folders_below(root: Path, folder: Path) -> Iterator[Path]:
    """A folder and all below it, links left out."""
    yield folder
    for entry in list_folder(root, folder):
        if is_folder(entry):
            yield from folders_below(root, Path(entry.path))


def hold_store(root: Path) -> AbstractContextManager[None]:
    """The lock of whoever changes a store; raises a UserError while another process holds it."""
    exists_inside(root, root / "reports" / "in_use")
    return hold(root / "reports" / "in_use", f"latents={root}", "wait until it has ended, or stop it first")


def set_aside(root: Path, path: Path) -> Path | None:
    """Move a file that must not stay to ``damaged/``, under its path in the store; returns where, None if it is gone.

    Raises:
        UserError: it cannot be moved.
    """
    if not exists_inside(root, path):
        return None
    target = place_aside(root, path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # On one file system, where what is below a store belongs; a copy could be cut off by what ails the disk.
        path.rename(target)
    except OSError as error:
        raise UserError(
            f"{path} must not stay in the store and cannot be moved to {target} ({error.strerror}); make its folder "
            "writable"
        ) from error
    return target


def place_aside(root: Path, path: Path) -> Path:
    """A free path in ``damaged/`` for a file of the store, numbered if an earlier one has its name.

    Raises:
        UnreadableFile: a folder there is a link.
    """
    target = root / DAMAGED_FOLDER / path.relative_to(root)
    exists_inside(root, target.parent)
    number, free = 0, target
    while os.path.lexists(free):
        number += 1
        free = target.with_name(f"{target.stem}.{number}{target.suffix}")
    return free
