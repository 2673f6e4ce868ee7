"""Surgeries: the contract of a technique, and the built-in techniques, a folder each.

``surgery.py`` is the contract, ``whole_tables.py`` what a surgery on whole tables returns, and ``checked.py`` calls a
surgery and checks its answers. A built-in technique is a folder beside ``trainable_tokens/``. It is registered in
``plugins/builtin.py`` through the same hook as a plugin's.
"""
