"""One run, and the writers of one run, at a time on an output.

The two are apart, because writers are processes of their own: if their run is killed, they may live
on for a moment. All writers of a run hold the right to write together, and against those of any
other run. Knows nothing of what is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from data_prep.ledger.commit import remove_leftovers
from data_prep.ledger.errors import OutputBusy
from data_prep.storage.folder import Folder
from flowreel.locks import LockHeld

_DYING_S = 90.0
"""How long the writers of a killed run may take to go, in seconds."""


@contextmanager
def lock_output(folder: Folder) -> Iterator[None]:
    """Hold an output for one run, against every other; a dead process holds nothing.

    What killed runs left is removed first.

    >>> import tempfile
    >>> from data_prep.storage.store import open_folder
    >>> folder = open_folder(tempfile.mkdtemp())
    >>> with lock_output(folder), lock_output(folder):
    ...     pass
    Traceback (most recent call last):
    ...
    data_prep.ledger.errors.OutputBusy: another run is writing to ...

    Raises:
        OutputBusy: another process holds it.
    """
    busy = f"another run is writing to {folder.where()}; wait for it, or choose another output"
    with _held(folder, ".lock", busy, wait_s=0.0):
        with lock_writing(folder):
            remove_leftovers(folder)
        yield


@contextmanager
def lock_writing(folder: Folder, run: str = "") -> Iterator[Callable[[], None]]:
    """Hold the right to write to an output; the writers of a killed run are waited for.

    A writer of a killed run that comes late is refused while one of another run is there. Entering
    gives a function that raises OutputBusy once the right is lost, as on a store that was long
    away. Whoever writes calls it before anything that cannot be undone.

    Args:
        folder: the output.
        run: names the run, whose writers hold the right together; empty: alone.

    Raises:
        OutputBusy: another process keeps it.
    """
    where = folder.where()
    busy = f"the writer of another run still holds {where}; run again when it is gone"
    with _held(folder, ".lock-writer", busy, wait_s=_DYING_S, group=run) as check:

        def still_ours() -> None:
            try:
                check()
            except LockHeld as error:
                raise OutputBusy(
                    f"the lease on {where} ran out, as the store or this process stood still for "
                    "long; run the same command again"
                ) from error

        yield still_ours


@contextmanager
def _held(
    folder: Folder, name: str, busy: str, *, wait_s: float, group: str = ""
) -> Iterator[Callable[[], None]]:
    with ExitStack() as stack:
        try:
            check = stack.enter_context(folder.lock(name, wait_s=wait_s, group=group))
        except LockHeld as error:
            raise OutputBusy(busy) from error
        yield check
