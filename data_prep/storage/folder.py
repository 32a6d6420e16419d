"""A folder on a disk or in an object store, by the same few calls; and the local folder.

A file is there whole or not at all: a local one is written under another name, synced and renamed
(`flowreel.files`), and a store shows one only after its completed PUT. Names are relative to their
folder. `data_prep.storage.store.open_folder` gives the folder of a path or URI. Knows nothing of
what the files hold.

    LockHeld(RuntimeError)   of `flowreel.locks`: somebody else holds the lock
"""

from __future__ import annotations

import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from data_prep.storage.location import (
    Location,
    absolute,
    failing,
    filesystem_of,
    shown,
    version_in_store,
)
from flowreel import files
from flowreel.locks import file_lock

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import fs

_PARTIAL = re.compile(rf"\..+\.\d+{re.escape(files.PARTIAL_SUFFIX)}")
_T = TypeVar("_T")
_R = TypeVar("_R")


def map_at_once(function: Callable[[_T], _R], values: Sequence[_T], threads: int) -> Iterator[_R]:
    """`map` on several threads, for calls that wait for an answer; results come in order.

    >>> list(map_at_once(str.upper, ["a", "b", "c"], threads=2))
    ['A', 'B', 'C']
    """
    if threads == 1 or len(values) < 2:
        yield from map(function, values)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="storage") as pool:
        # In parts, so that few results wait in memory until the caller takes them.
        for start in range(0, len(values), 2 * threads):
            yield from pool.map(function, values[start : start + 2 * threads])


class Folder(ABC):
    """Files below one location, by relative names such as `manifests/00000.json`."""

    threads = 1
    """How many requests are worth making at once."""

    def __init__(self, location: Location) -> None:
        self.location = absolute(location)
        self._filesystem: tuple[fs.FileSystem, str] | None = None

    def _at(self, name: str = "") -> tuple[fs.FileSystem, str]:
        if self._filesystem is None:
            self._filesystem = filesystem_of(self.location)
        filesystem, root = self._filesystem
        return filesystem, f"{root}/{name}" if name else root

    def where(self, name: str = "") -> str:
        """Location of a file, for messages."""
        return f"{shown(self.location)}/{name}" if name else shown(self.location)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_filesystem": None}

    def failing(self, action: str, name: str = "") -> AbstractContextManager[None]:
        """`data_prep.storage.location.failing` for a file of this folder."""
        return failing(action, f"{shown(self.location)}/{name}" if name else self.location)

    def read(self, name: str) -> bytes:
        """The whole of a small file. Raises FileNotFoundError, StorageError."""
        with self.failing("read", name):
            filesystem, path = self._at(name)
            with filesystem.open_input_stream(path) as stream:
                return bytes(stream.read())

    def exists(self, name: str) -> bool:
        """Whether a file is there."""
        with self.failing("look at", name):
            filesystem, path = self._at(name)
            return bool(filesystem.get_file_info(path).is_file)

    def size(self, name: str) -> int:
        """Bytes of a file, or of all files below a folder; 0 where there is neither."""
        from pyarrow import fs

        with self.failing("look at", name):
            filesystem, path = self._at(name)
            info = filesystem.get_file_info(path)
            if info.is_file:
                return int(info.size)
            below = fs.FileSelector(path, recursive=True, allow_not_found=True)
            return sum(int(entry.size or 0) for entry in filesystem.get_file_info(below))

    def view(self, name: str) -> pa.Buffer:
        """The whole of a file, mapped into memory where it lies on a disk of this machine.

        Raises FileNotFoundError, StorageError.
        """
        with self.failing("read", name):
            filesystem, path = self._at(name)
            with filesystem.open_input_stream(path) as stream:
                return stream.read_buffer()

    def sizes(self, name: str) -> dict[str, int]:
        """Bytes of every file right in a folder, by base name, from one listing."""
        from pyarrow import fs

        with self.failing("list", name):
            filesystem, path = self._at(name)
            entries = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
        return {entry.base_name: int(entry.size) for entry in entries if entry.is_file}

    def version(self, name: str) -> str:
        """What tells a file from another that takes its place; empty where it is not there."""
        try:
            with self.failing("look at", name):
                return self._version(name)
        except FileNotFoundError:
            return ""

    def _version(self, name: str) -> str:
        return version_in_store(*self._at(name))

    def open(self, name: str) -> pa.NativeFile:
        """A file for random access. Raises FileNotFoundError, StorageError."""
        with self.failing("open", name):
            filesystem, path = self._at(name)
            return filesystem.open_input_file(path)

    def names(self, folder: str = "") -> list[str]:
        """Base names of the files right in a folder, sorted; none where it is not there."""
        return self._list(folder, want_files=True)

    def folders(self, folder: str = "") -> list[str]:
        """Base names of the folders right in a folder, sorted."""
        return self._list(folder, want_files=False)

    def _list(self, folder: str, *, want_files: bool) -> list[str]:
        from pyarrow import fs

        with self.failing("list", folder):
            filesystem, path = self._at(folder)
            entries = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
        kind = fs.FileType.File if want_files else fs.FileType.Directory
        bases = (entry.base_name for entry in entries if entry.type == kind)
        return sorted(base for base in bases if not base.startswith("."))

    @abstractmethod
    def write(self, name: str, data: bytes | pa.Buffer) -> None:
        """Write a file, whole or not at all. Raises StorageError."""

    @abstractmethod
    def writing(self, name: str) -> AbstractContextManager[pa.NativeFile]:
        """A stream for a file that fits in memory; it becomes the file, whole, on leaving in peace.

        Raises StorageError.
        """

    @abstractmethod
    def replacing(self, name: str) -> AbstractContextManager[Path]:
        """A local path to write to; what is there on leaving in peace becomes the file, whole."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""

    @abstractmethod
    def remove_folder(self, name: str) -> None:
        """Remove a folder and all in it, if it is there."""

    @abstractmethod
    def remove_partials(self) -> None:
        """Remove what killed writers left. Call it only while the folder's locks are held."""

    @abstractmethod
    def lock(
        self, name: str, *, wait_s: float = 0.0, group: str = ""
    ) -> AbstractContextManager[Callable[[], None]]:
        """Hold a lock of this folder against every other process, or against every other group.

        The lock ends with this process at the latest. Entering gives a function that raises
        LockHeld where the lock was lost in the meantime.

        Args:
            name: name of the lock's file.
            wait_s: how long to wait for another holder, in seconds.
            group: processes that name the same group hold the lock together; empty: alone.

        Raises:
            LockHeld: somebody else holds it.
        """


class LocalFolder(Folder):
    """A folder on a disk of this machine, or on a file system that several machines share.

    >>> import tempfile
    >>> folder = LocalFolder(tempfile.mkdtemp())
    >>> folder.write("notes/a.txt", b"whole")
    >>> folder.names("notes"), folder.read("notes/a.txt"), folder.size("notes")
    (['a.txt'], b'whole', 5)
    """

    def _path(self, name: str) -> Path:
        return Path(self.location, name)

    def write(self, name: str, data: bytes | pa.Buffer) -> None:
        """Write a file, whole or not at all; folders on the way are made."""
        with self.replacing(name) as partial, partial.open("wb") as file:
            file.write(data)

    def view(self, name: str) -> pa.Buffer:
        """The whole of a file, mapped into memory."""
        import pyarrow as pa

        with self.failing("read", name), pa.memory_map(str(self._path(name))) as content:
            return content.read_buffer()

    @contextmanager
    def writing(self, name: str) -> Iterator[pa.NativeFile]:
        """A stream to a file beside the file's, which takes its place on leaving in peace."""
        import pyarrow as pa

        with self.replacing(name) as partial, pa.OSFile(str(partial), "wb") as stream:
            yield stream

    @contextmanager
    def replacing(self, name: str) -> Iterator[Path]:
        """A path beside the file's, which takes its place on leaving in peace."""
        with self.failing("write", name), files.replacing(self._path(name)) as partial:
            yield partial

    def _version(self, name: str) -> str:
        # A file is replaced by a rename, so that its inode tells as well, whatever the clock says.
        about = self._path(name).stat()
        return f"size:{about.st_size} mtime_ns:{about.st_mtime_ns} inode:{about.st_ino}"

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with self.failing("remove", name):
            self._path(name).unlink(missing_ok=True)

    def remove_folder(self, name: str) -> None:
        """Remove a folder and all in it, if it is there."""
        path = self._path(name)
        with self.failing("remove", name):
            if path.is_dir():
                shutil.rmtree(path)

    def remove_partials(self) -> None:
        """Remove the unfinished files of writers that were killed."""
        for path in Path(self.location).rglob(f".*{files.PARTIAL_SUFFIX}"):
            if _PARTIAL.fullmatch(path.name):
                path.unlink(missing_ok=True)

    @contextmanager
    def lock(
        self, name: str, *, wait_s: float = 0.0, group: str = ""
    ) -> Iterator[Callable[[], None]]:
        """Hold an flock, which the kernel lets go of when the process dies: it is never lost.

        A group holds it shared, and its name is the content of the file.
        """
        with ExitStack() as stack:
            with self.failing("lock", name):
                Path(self.location).mkdir(parents=True, exist_ok=True)
                stack.enter_context(file_lock(self._path(name), wait_s=wait_s, group=group))
            yield lambda: None
