"""Where a plugin is not installed, its tests find it beside them."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

for _folder in sorted(Path(__file__).resolve().parent.glob("embedsurgery-*")):
    if find_spec(_folder.name.replace("-", "_")) is None:
        sys.path.insert(0, str(_folder))
