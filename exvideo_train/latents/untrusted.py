"""Stores from strangers: nothing below one is followed through a link, and every field is held against a schema.

The store's own folder may be a link: whoever names it has chosen where it leads. A link below it leads wherever the
store's author wanted, and who verifies, trains or encodes would read, move or write files that are no part of it.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exvideo_train.errors import UnreadableFile, UserError
from exvideo_train.files import short
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


# -- fields: what one may hold, said in the words that its error uses --------------------------------------------


@dataclass(frozen=True)
class Kind:
    """Values that a field may have, and their name in "must be ..."."""

    words: str
    accepts: Callable[[Any], bool]


def _number(least: float, most: float) -> Callable[[Any], bool]:
    # True is an int too; NaN compares with nothing; an int of any length compares without becoming a float.
    return lambda value: type(value) in (int, float) and least <= value <= most


def _count(least: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value < 1 << 53


def _matches(pattern: str) -> Callable[[Any], bool]:
    compiled = re.compile(pattern)
    return lambda value: isinstance(value, str) and compiled.fullmatch(value) is not None


TEXT = Kind("text", lambda value: isinstance(value, str))
COUNT = Kind("a whole number from 0 to 2**53", _count(0))
POSITIVE_COUNT = Kind("a whole number from 1 to 2**53", _count(1))
YES_OR_NO = Kind("true or false", lambda value: isinstance(value, bool))
RATE = Kind("a number of frames a second from 1e-6 to 1e6", _number(1e-6, 1e6))
SHA256 = Kind("a sha256 in 64 hex digits", _matches("[0-9a-f]{64}"))
# It becomes a file name: nothing that could lead out of a folder.
CLIP_ID = Kind("3 to 200 letters, digits, - or _", _matches("[A-Za-z0-9_-]{3,200}"))
DTYPE = Kind("bf16, fp16 or fp32", lambda value: value in ("bf16", "fp16", "fp32"))


def check_fields(
    content: Any, kinds: Mapping[str, Kind], optional: Mapping[str, Kind] | None = None, others: bool = True
) -> dict[str, Any]:
    """A JSON object whose fields are what they should be; optional ones may be null, which is to be absent.

    Args:
        others: whether it may have other fields, which are left as they are.

    Raises:
        ValueError: it is no object, or names the field that is missing, unknown or has another value.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{short(content)} is no JSON object")
    for name, kind in kinds.items():
        if name not in content:
            raise ValueError(f"{name} is missing")
        check_value(name, content[name], kind)
    present = {name: value for name, value in content.items() if value is not None or name in kinds}
    for name, kind in (optional or {}).items():
        if name in present:
            check_value(name, present[name], kind)
    if not others and len(present) > len(kinds):
        unknown = sorted(set(present) - set(kinds) - set(optional or ()))
        if unknown:
            raise ValueError(f"{', '.join(map(short, unknown[:5]))}: unknown field")
    return present


def check_value(name: str, value: Any, kind: Kind) -> None:
    """Check one value.

    Raises:
        ValueError: it is of another kind; the message has its name and the value.
    """
    if not kind.accepts(value):
        raise ValueError(f"{name}={short(value)}: must be {kind.words}")
