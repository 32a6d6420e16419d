"""The settings that an output was begun with, held against those of a run.

Knows nothing of what any setting means.
"""

from __future__ import annotations

from typing import Any

from data_prep.latents.records import INFO_NAME, read_info_values
from data_prep.ledger.errors import SettingsChanged
from data_prep.storage.folder import Folder
from flowreel.values import flattened


def changed_settings(folder: Folder, settings: dict[str, Any]) -> str:
    """The settings that differ from the output's, for people; empty where none does.

    Args:
        folder: the output; a new one has no settings to differ from.
        settings: what decides status and latents, as plain values.
    """
    if not folder.exists(INFO_NAME):
        return ""
    before = flattened(read_info_values(folder.location).get("settings", {}))
    now = flattened(settings)
    names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    return ", ".join(f"{name}: {before.get(name)!r} → {now.get(name)!r}" for name in names)


def check_settings(folder: Folder, settings: dict[str, Any]) -> None:
    """Hold the settings against those that the output was begun with.

    Raises:
        SettingsChanged: naming every setting that differs.
    """
    if changes := changed_settings(folder, settings):
        raise SettingsChanged(
            f"{folder.where()} was prepared with other settings ({changes}); choose another "
            "output, set them back, or prepare with --redo, which makes anew what they affect"
        )
