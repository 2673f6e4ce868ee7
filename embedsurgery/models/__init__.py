"""The public functions for models in memory: walk, attach, merge, unmerge, add tokens.

``checkpoints/`` has those for checkpoints on disk.

Each file has the functions of one task; ``targets.py`` has what they share. They put the lower packages together.

Imports inside functions keep torch and the attachment's runtime out of ``embedsurgery.walk`` on a checkpoint.
"""
