"""Several adapters and a base become one plan: weights, conflicts, non-finite rows.

``single.py`` plans one adapter, ``several.py`` several of them. A new way to settle a conflict goes into
``conflicts.py``.
"""
