"""Checks quickly whether any installed package may be a plugin.

importlib.metadata would say for sure, but importing and asking it takes as long as everything else that ``--help``
does. ``discovery.py`` asks it, if this check says so.
"""

from __future__ import annotations

import os
import sys

GROUP = "embedsurgery"
"""The entry point group of plugins."""


def may_have_plugins() -> bool:
    """Whether a package on the path may have an entry point in `GROUP`."""
    # Other finders may know packages that no directory shows.
    others = [finder for finder in sys.meta_path if getattr(finder, "__module__", "") != "_frozen_importlib_external"]
    return any(hasattr(f, "find_distributions") for f in others) or any(map(_has_group, dict.fromkeys(sys.path)))


def _has_group(folder: str) -> bool:
    try:
        with os.scandir(folder or ".") as entries:
            infos = [entry.path for entry in entries if entry.name.lower().endswith((".dist-info", "egg-info"))]
    except OSError:
        return os.path.isfile(folder)  # a zip file, whose packages this check does not read
    for path in infos:
        try:
            with open(os.path.join(path, "entry_points.txt"), "rb") as file:
                if f"[{GROUP}]".encode() in file.read():
                    return True
        except OSError:  # most have no entry points
            continue
    return False
