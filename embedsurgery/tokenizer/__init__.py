"""Adds tokens to tokenizers and removes them, in files and in memory.

``reading.py`` reads a checkpoint's tokenizer files, and ``patching.py`` computes their new bytes. ``live.py`` and
``slow.py`` edit a tokenizer in memory. ``content.py`` and ``edit.py`` have the rules that files and memory share, and
``encoding.py`` the checks that really encode. A new kind of file beside ``tokenizer.json`` belongs in ``reading.py``
and ``sidecars.py``, a class that sets its own post-processor in ``classes.py``.
"""
