"""Tokens in and out of a tokenizer, in files and in memory.

``reading.py`` reads what the files say, ``patching.py`` makes their new bytes, ``live.py`` and ``slow.py`` change a
tokenizer in memory. A file that another library invents is read in ``reading.py`` and rewritten in ``sidecars.py``.
"""
