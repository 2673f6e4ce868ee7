"""Stores hold tables: a model, a state dict or the files of a checkpoint. One `apply` edits them all.

``store.py`` is the contract. ``apply.py`` applies plans, which ``checks.py`` checks first. A new edit is implemented in
``apply.py`` and in the stores that can do it: ``modules.py``, ``state_dicts.py`` and ``shards.py``.
"""
