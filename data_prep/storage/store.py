"""A folder in an object store, and the way to a folder wherever it lies.

Knows nothing of what the files hold.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.storage.folder import Folder, LocalFolder
from data_prep.storage.lease import hold_lease
from data_prep.storage.location import Location, failing, is_uri

if TYPE_CHECKING:
    import pyarrow as pa

_STORE_THREADS = 16


def open_folder(location: Location) -> Folder:
    """The folder at a location; nothing is made or looked at yet.

    >>> type(open_folder("/data/latents")).__name__, type(open_folder("s3://b/latents")).__name__
    ('LocalFolder', 'StoreFolder')
    """
    return StoreFolder(location) if is_uri(location) else LocalFolder(location)


class StoreFolder(Folder):
    """A prefix in an object store. Its folders are only the slashes in its files' names."""

    threads = _STORE_THREADS

    def write(self, name: str, data: bytes | pa.Buffer) -> None:
        """Put a file; a store shows it only after the whole PUT."""
        with self.failing("write", name), ThreadPoolExecutor(1) as pool:
            # Ctrl-C may interrupt the main thread, and closing a stream early would complete the
            # upload of what it had so far: so the PUT runs in a thread that is not interrupted.
            pool.submit(self._put, name, data).result()

    def _put(self, name: str, data: bytes | pa.Buffer) -> None:
        filesystem, path = self._at(name)
        with filesystem.open_output_stream(path) as stream:
            stream.write(data)

    @contextmanager
    def writing(self, name: str) -> Iterator[pa.NativeFile]:
        """A stream into memory; on leaving in peace its content is put into the store."""
        import pyarrow as pa

        stream = pa.BufferOutputStream()
        yield stream
        self.write(name, stream.getvalue())

    @contextmanager
    def replacing(self, name: str) -> Iterator[Path]:
        """A path on the local disk; on leaving in peace its content is put into the store."""
        import pyarrow as pa

        with tempfile.TemporaryDirectory(prefix="flowreel-") as folder:
            partial = Path(folder, "file")
            with failing("write", partial):
                yield partial
            with pa.memory_map(str(partial)) as content:
                self.write(name, content.read_buffer())

    def copy_from(self, source: Folder, name: str, target_name: str) -> bool:
        """Have the store copy a file of its own; False if `source` is not in the same store."""
        if not isinstance(source, StoreFolder):
            return False
        (filesystem, path), (own, target) = source._at(name), self._at(target_name)
        if not filesystem.equals(own):
            return False
        with source.failing("copy", name):
            own.copy_file(path, target)
        return True

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with self.failing("remove", name):
            filesystem, path = self._at(name)
            try:
                filesystem.delete_file(path)
            except FileNotFoundError:
                return

    def remove_folder(self, name: str) -> None:
        """Remove all files below a prefix."""
        with self.failing("remove", name):
            filesystem, path = self._at(name)
            try:
                filesystem.delete_dir(path)
            except FileNotFoundError:
                return

    def remove_partials(self) -> None:
        """Do nothing: a store shows no partial file, and its own rules end broken uploads."""

    def lock(
        self, name: str, *, wait_s: float = 0.0, group: str = ""
    ) -> AbstractContextManager[Callable[[], None]]:
        """Hold a lease (`data_prep.storage.lease`), which the function given on entering checks."""
        return hold_lease(self, name, wait_s=wait_s, group=group)
