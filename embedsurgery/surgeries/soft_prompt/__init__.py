"""Soft prompts: trained vectors in front of the embedded input.

``surgery.py`` is the technique; ``config.py`` and ``bake_config.py`` have what a user asks, ``peft_files.py`` PEFT's
form, ``baking.py`` turns a prompt into tokens. The hooks of a live prompt are in ``runtime/prompts/``.
"""
