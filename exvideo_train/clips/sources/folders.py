"""The folder of a data set: what lies in it, and nothing else, is found and read.

Data comes from strangers: an archive that was unpacked may hold a link to ``/etc/passwd`` under the name of a caption,
a pipe that waits for ever, a device without an end. Only regular files are read, and links are followed only as far as
they stay below the folder, unless the user says otherwise.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar, NamedTuple

from exvideo_train.clips.container import Reason, UnreadableClip, split_video
from exvideo_train.clips.sources.base import BAD_NAME, VIDEO_SUFFIXES, Dropped, RawRows, Source, videos_folder
from exvideo_train.errors import UserError

_OPEN_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW
_ROWS_A_PIECE = 2000
_FOLLOW = "follow_links=true follows it"


class Refused(NamedTuple):
    """An entry of a folder that may not be read, and why."""

    name: str
    problem: UnreadableClip
    is_folder: bool


@dataclass
class Listing:
    """One folder of a tree.

    Attributes:
        folder: its path.
        files: names of the regular files in it, sorted; hidden ones are left out.
        refused: what may not be read.
    """

    folder: str
    files: list[str] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)

    def videos(self) -> list[str]:
        """Names of the video files."""
        names = [name for name in self.files if name.lower().endswith(VIDEO_SUFFIXES)]
        return [name for name in names if not name_problem(os.path.join(self.folder, name))]

    def drops(self, suffixes: tuple[str, ...]) -> list[Dropped]:
        """What is not used: what would be a video or a folder of them, and names that say nothing."""
        drops = []
        for name, problem, is_folder in sorted(self.refused, key=lambda entry: entry.name):
            path = os.path.join(self.folder, name)
            if is_folder or name.lower().endswith(suffixes):
                drops.append(Dropped(problem.reason, problem.detail, path, path))
        for name in self.files:
            path = os.path.join(self.folder, name)
            problem_of_name = name_problem(path)
            if problem_of_name:
                drops.append(Dropped(BAD_NAME, problem_of_name, path, path))
        return drops


def name_problem(name: str) -> str:
    """Why nothing can be made of a file or member by its name, empty when nothing is wrong."""
    stem, suffix = os.path.splitext(os.path.basename(name))
    if not stem:
        return "it has no name"
    if not suffix.strip("."):
        return f"{name} has no suffix that says what it is"
    if "\0" in name:
        return "its name holds a NUL"
    if split_video(name)[1] is not None:
        return f"{name} reads like a member of a shard"
    return ""


@dataclass
class FolderSource(Source):
    """A data set that is found by walking its folder."""

    videos: str
    follow_links: bool = False
    progress_unit: str = field(default="files", init=False)

    shards: ClassVar[tuple[str, ...]] = ()
    """Suffixes of files that hold many clips: each is a piece of its own."""
    lacking: ClassVar[str] = f"no video file ({', '.join(VIDEO_SUFFIXES)})"
    """What a folder holds in which nothing is found."""

    def __post_init__(self) -> None:
        self._folder = DataFolder(str(videos_folder(self.videos)), self.follow_links)

    def total_progress(self) -> None:
        return None

    def pieces(self) -> Iterator[RawRows]:
        found, refused = False, ""
        for listing in self._folder.walk():
            shards = [name for name in listing.files if name.endswith(self.shards)]
            videos, dropped = listing.videos(), self.drops(listing)
            found = found or bool(shards or videos)
            refused = refused or (dropped[0].detail if dropped else "")
            for name in shards:
                yield RawRows(listing.folder, [(0, name)], 1)
            for start in range(0, len(videos), _ROWS_A_PIECE):
                part = videos[start : start + _ROWS_A_PIECE]
                yield RawRows(listing.folder, list(enumerate(part)), len(part))
            if dropped:
                yield RawRows(listing.folder, [], 0, dropped)
        if not found:
            why = f"; not used: {refused}" if refused else ""
            raise UserError(f"videos={self.videos} holds {self.lacking}{why}")

    def drops(self, listing: Listing) -> list[Dropped]:
        """What of a folder is not used."""
        return listing.drops((*VIDEO_SUFFIXES, *self.shards))


@dataclass(frozen=True)
class DataFolder:
    """A folder that the user gave.

    Args:
        path: absolute, as the user spelled it; it may itself be reached through links.
        follow_links: also follow links that lead out of it.
    """

    path: str
    follow_links: bool = False

    def walk(self) -> Iterator[Listing]:
        """Every folder of the tree in a fixed order; links to folders within are followed, each folder once."""
        seen: set[tuple[int, int]] = set()
        stack = [self.path]
        while stack:
            current = stack.pop()
            try:
                status = os.stat(current)
                if (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
                listing, folders = self._list(current)
            except OSError as error:
                # A path beyond what the system opens costs itself; one that may not be read is the user's to repair.
                if error.errno != errno.ENAMETOOLONG:
                    raise
                parent, name = os.path.split(current)
                yield Listing(
                    parent, [], [Refused(name, UnreadableClip(Reason.READ_ERROR, "its path is too long"), True)]
                )
                continue
            yield listing
            stack.extend(sorted(folders, reverse=True))

    def _list(self, current: str) -> tuple[Listing, list[str]]:
        listing, folders = Listing(current), []
        with os.scandir(current) as entries:
            for entry in entries:
                try:
                    if entry.is_symlink():
                        self._check_link(entry.path)
                    if entry.is_dir():
                        folders.append(entry.path)
                    elif entry.name.startswith("."):
                        continue
                    elif entry.is_file():
                        listing.files.append(entry.name)
                    else:
                        raise _not_a_file(entry.path)
                except UnreadableClip as problem:
                    is_folder = os.path.isdir(entry.path)
                    if is_folder or not entry.name.startswith("."):
                        listing.refused.append(Refused(entry.name, problem, is_folder))
        listing.files.sort()
        return listing, folders

    def _check_link(self, path: str) -> str:
        """Where a link leads.

        Raises:
            UnreadableClip: out of the folder, or nowhere.
        """
        try:
            real = os.path.realpath(path, strict=True)
        except OSError as error:
            raise UnreadableClip(Reason.MISSING, f"{path} is a link that leads nowhere ({error.strerror})") from None
        if not self.follow_links and not _is_below(real, _real(self.path)):
            raise UnreadableClip(Reason.OUTSIDE, f"{path} is a link to {real}, out of {self.path}; {_FOLLOW}")
        return real

    def check_video(self, path: str) -> None:
        """Whether a path that metadata names is a regular file of this folder.

        Args:
            path: absolute and normalised.

        Raises:
            UnreadableClip: it is not, with the reason.
        """
        inside = _real(self.path)
        try:
            if path == self.path:
                raise _not_a_file(path)
            if not _is_below(path, self.path) and not _is_below(os.path.realpath(path), inside):
                raise UnreadableClip(
                    Reason.OUTSIDE, f"{path} is not below {self.path}; videos= takes the folder of all of them"
                )
            if not self.follow_links and not _is_below(_real(os.path.dirname(path)), inside):
                raise UnreadableClip(Reason.OUTSIDE, f"a folder of {path} is a link out of {self.path}; {_FOLLOW}")
            status = os.lstat(path)
            if stat.S_ISLNK(status.st_mode):
                self._check_link(path)
                status = os.stat(path)
        except OSError as error:
            reason = Reason.PERMISSION if isinstance(error, PermissionError) else Reason.MISSING
            raise UnreadableClip(reason, f"{path}: {error.strerror}") from None
        if not stat.S_ISREG(status.st_mode):
            raise _not_a_file(path)

    def read(self, path: str, max_bytes: int) -> bytes | None:
        """The first bytes of a file beside a video, None when there is none.

        Raises:
            UnreadableClip: it may not be read, with the reason.
        """
        try:
            try:
                # Without O_NONBLOCK opening a pipe waits for its writer.
                descriptor = os.open(path, _OPEN_FLAGS)
            except OSError as error:
                if error.errno not in (errno.ELOOP, errno.EMLINK):
                    raise
                descriptor = os.open(self._check_link(path), _OPEN_FLAGS)
            with open(descriptor, "rb") as stream:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise _not_a_file(path)
                return stream.read(max_bytes)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            # A socket cannot be opened at all, nor can a folder be read.
            if error.errno in (errno.ENXIO, errno.EISDIR):
                raise _not_a_file(path) from None
            reason = Reason.PERMISSION if isinstance(error, PermissionError) else Reason.READ_ERROR
            raise UnreadableClip(reason, f"{path}: {error.strerror}") from None


def _not_a_file(path: str) -> UnreadableClip:
    return UnreadableClip(Reason.NOT_A_FILE, f"{path} is not a regular file")


@lru_cache(maxsize=4096)
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def _is_below(path: str, folder: str) -> bool:
    """Whether a path is a folder or something in it; both absolute and normalised."""
    return path == folder or path.startswith(folder if folder.endswith(os.sep) else folder + os.sep)
