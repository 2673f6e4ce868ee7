"""Row overrides: an adapter's rows in forward passes, without a copy of the table.

``rows.py`` has the trainable rows, ``sites.py`` the hooks of lookups and projections, ``columns.py`` and
``sliced_head.py`` the products over a table, ``installation.py`` puts the hooks on and off. Where code reads a weight
outside of its module, a full copy is made: ``full_copy.py``, ``overlays.py`` and ``stand_in.py``.
"""
