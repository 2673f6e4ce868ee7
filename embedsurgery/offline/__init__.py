"""Merging into and out of checkpoints on disk, without torch and without loading the model.

``merging.py`` and ``unmerging.py`` make jobs: plans, and what their records say (``jobs.py``). ``writing.py`` does them
in a new directory or, with ``in_place.py``, where the checkpoint lies; ``recovery.py`` ends what a crash left.
"""

from __future__ import annotations

from embedsurgery.offline.merging import add_tokens_checkpoint, merge_checkpoint
from embedsurgery.offline.recovery import RecoveryReport, recover_checkpoint
from embedsurgery.offline.report import MergeReport, Progress
from embedsurgery.offline.unmerging import unmerge_checkpoint

__all__ = ["MergeReport", "Progress", "RecoveryReport", "add_tokens_checkpoint", "merge_checkpoint",
           "recover_checkpoint", "unmerge_checkpoint"]  # fmt: skip
