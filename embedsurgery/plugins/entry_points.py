"""Whether any package that is installed may be a plugin, found without importing anything for it.

importlib.metadata would know for sure, and takes as long to ask as all else that a list of verbs takes. Which plugins
there are, and what they bring, is ``registry.py``'s.
"""

from __future__ import annotations

import os
import sys

GROUP = "embedsurgery"
"""Of the entry points that lead to plugins."""


def plugins_at_hand() -> bool:
    """Whether a package on the path may name our group of entry points."""
    others = [finder for finder in sys.meta_path if getattr(finder, "__module__", "") != "_frozen_importlib_external"]
    return any(hasattr(f, "find_distributions") for f in others) or any(map(_names_group, dict.fromkeys(sys.path)))


def _names_group(folder: str) -> bool:
    try:
        with os.scandir(folder or ".") as entries:
            found = [entry.path for entry in entries if entry.name.lower().endswith((".dist-info", "egg-info"))]
    except OSError:
        return os.path.isfile(folder)  # a zip file of packages
    for path in found:
        try:
            with open(os.path.join(path, "entry_points.txt"), "rb") as file:
                if f"[{GROUP}]".encode() in file.read():
                    return True
        except OSError:  # most have none
            continue
    return False
