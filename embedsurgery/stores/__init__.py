"""Stores: where tables live, in a model, a state dict or the files of a checkpoint; all edited by one `apply`.

``store.py`` is the contract and ``apply.py`` does plans, which ``checks.py`` checks before anything changes. A new
edit is done in ``apply.py`` and in the stores that can do it: ``modules.py``, ``state_dicts.py`` and ``shards.py``.
"""
