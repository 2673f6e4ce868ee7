"""Row overrides: an adapter's rows in forward passes, without a copy of the table.

``rows.py`` has the trainable rows, ``sites.py`` the hooks of lookups and projections, ``columns.py``,
``sparse_lookup.py`` and ``sliced_head.py`` their arithmetic, ``installation.py`` registers and removes the hooks. For
code that reads a weight outside of its module, ``full_copy.py``, ``overlays.py`` and ``stand_in.py`` make a full copy.
``mixing.py`` is for `Attachment.per_sample`, ``sharded.py`` for several devices.
"""
