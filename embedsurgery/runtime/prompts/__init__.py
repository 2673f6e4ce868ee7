"""Soft prompts in forward passes: hooks that put virtual tokens in front of the input.

``live.py`` is what hooks look at, ``stack_hooks.py`` and ``outer_hooks.py`` what they do, ``installation.py`` puts them
on and off. ``masks.py``, ``positions.py``, ``caches.py`` and ``outputs.py`` each know one thing that a call is given or
returns.
"""
