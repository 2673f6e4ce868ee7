"""Soft prompts in forward passes: hooks that insert virtual tokens before a model's input.

``live.py`` is the state that the hooks read. ``stack_hooks.py``, ``lookup_hooks.py`` and ``outer_hooks.py`` are the
hooks, and ``installation.py`` registers and removes them. ``stacks.py`` finds the modules that get a prompt.
``layout.py`` computes where the virtual tokens are inserted; ``masks.py``, ``positions.py``, ``caches.py``,
``inputs.py`` and ``outputs.py`` each handle one part of a call. ``task_heads.py`` saves the heads that a prompt was
trained with.
"""
