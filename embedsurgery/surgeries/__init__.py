"""Surgeries: the contract of a technique, and the built-in ones, a folder each.

``surgery.py`` is the contract; a new built-in technique is a folder beside ``trainable_tokens/``, registered in
``plugins/builtin.py`` through the same hook as a plugin's.
"""
