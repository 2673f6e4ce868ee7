"""Numbers as bytes with a dtype, and the torch side of them.

``raw.py`` needs numpy at most and has the one rounding function; ``convert.py`` turns torch tensors into raw arrays and
back; ``memory.py`` says whose memory a tensor is; ``sharded.py`` knows DTensor, FSDP and ZeRO. A new dtype starts in
``raw.py`` and ``convert.py``.
"""
