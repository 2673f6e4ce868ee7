"""Arrays as bytes with a dtype, and their conversion from and to torch tensors.

``raw.py`` has the arrays and the one rounding function, without torch. ``convert.py`` converts torch tensors.
``memory.py`` identifies the memory of a tensor, to find ties. ``sharded.py`` handles DTensor, FSDP and ZeRO-3. A new
dtype is added in ``raw.py`` and ``convert.py``.
"""
