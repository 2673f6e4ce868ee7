"""Turns the adapters of one merge into plans: weights, conflicts and non-finite values.

``single.py`` plans one adapter, ``several.py`` plans all adapters of a merge. A new way to resolve a conflict goes into
``conflicts.py``.
"""
