"""Models in memory: walk, attach, merge, unmerge, add tokens. ``checkpoints/`` does the same on disk.

Each file has the public functions of one job; ``targets.py`` has what they share.
"""
