"""Adapters: manifest and tensors, their directory on disk, and their tables found again in a base.

``adapter.py`` reads and writes the directory, which PEFT reads too; a new field of the manifest starts in
``manifest.py``. ``locate.py`` finds an adapter's tables in another graph; ``new_tokens.py`` plans ids and rows of new
tokens.
"""
