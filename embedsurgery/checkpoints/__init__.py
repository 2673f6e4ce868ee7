"""Merges adapters into checkpoints on disk and unmerges them, without torch and without loading the model.

``merging.py``, ``adding.py`` and ``unmerging.py`` make jobs: plans, and what to record of them (``jobs.py``).
``writing.py`` applies jobs to a new directory or, with ``in_place.py`` and ``journal.py``, to the checkpoint itself.
``recovery.py`` cleans up after a crash. This file imports nothing: each command imports only what it needs.
"""
