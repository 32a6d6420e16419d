"""What can be wrong with an output, as one tree. Knows nothing of who asked.

LedgerError(FlowreelError, ValueError)
├── OutputBusy        another run holds the output's lock
├── SettingsChanged   the output was prepared with other settings
├── DamagedManifest   a manifest that cannot be read
└── SourceGone        the source shards that captions need are not as they were
"""

from __future__ import annotations

from flowreel.errors import FlowreelError


class LedgerError(FlowreelError, ValueError):
    """The output folder cannot be used as it stands."""


class OutputBusy(LedgerError):
    """Another run is writing to the same output."""


class SettingsChanged(LedgerError):
    """The output holds what other settings made."""


class DamagedManifest(LedgerError):
    """A manifest that is no JSON, or lacks what it must say."""


class SourceGone(LedgerError):
    """The source shards that the captions need are not there, or not as they were."""
