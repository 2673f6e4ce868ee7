"""The hooks that a plugin can implement: the whole contract, in one file.

With ``registry.py`` the only file that imports pluggy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from embedsurgery.surgeries.base import SurgeryRecord

PROJECT = "embedsurgery"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class Hooks:
    """Every hook returns values and changes none of its arguments."""

    @hookspec
    def embedsurgery_surgeries(self) -> Sequence[SurgeryRecord]:  # type: ignore[empty-body]
        """Return the records of the surgeries that this plugin brings."""
