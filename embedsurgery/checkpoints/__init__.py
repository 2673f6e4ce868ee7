"""Merging into and out of checkpoints on disk, without torch and without loading the model.

``merging.py``, ``adding.py`` and ``unmerging.py`` make jobs: plans, and what their records say (``jobs.py``).
``writing.py`` does them in a new directory or, with ``in_place.py``, where the checkpoint lies; ``recovery.py`` ends
what a crash left. Nothing is imported here: each verb imports what it does.
"""
