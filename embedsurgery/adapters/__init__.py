"""Adapters: manifest and tensors, their directory on disk, and the search for their tables in a base.

``adapter.py`` reads and writes the directory, in PEFT's format. A new field of the manifest belongs in ``manifest.py``.
``locate.py`` finds an adapter's tables in another graph. ``new_tokens.py`` plans new tokens, and ``carried_tokens.py``
adds those of an adapter to another base.
"""
