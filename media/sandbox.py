"""What the decoding process may not do: outgrow its memory, outlive its parent, reach a network.

Called once, by the child itself, before it reads anything. Linux gives all of it, other systems as
much as they have. Standard library only. Knows nothing of videos.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000


def confine(memory_bytes: int) -> bool:
    """Limit this process; returns whether it is cut off from every network."""
    offline = _leave_network()
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    # Threads come last: a process with several may not enter a user namespace.
    threading.Thread(target=_leave_with_parent, args=(os.getppid(),), daemon=True).start()
    return offline


def _leave_network() -> bool:
    """Enter a network namespace of its own, which holds not even a working loopback."""
    try:
        unshare = ctypes.CDLL(None, use_errno=True).unshare
    except (OSError, AttributeError):
        return False
    # Root needs no namespace of users for it; others do, where the system lets them.
    return any(unshare(flags) == 0 for flags in (_CLONE_NEWNET, _CLONE_NEWUSER | _CLONE_NEWNET))


def _leave_with_parent(parent: int) -> None:
    """A killed parent must not leave a decoder that loops forever."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
