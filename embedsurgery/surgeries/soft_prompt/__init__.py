"""Soft prompts: trained vectors before the embedded input.

``surgery.py`` is the technique, ``config.py`` and ``bake_config.py`` the user's options, ``initial_rows.py`` how a
prompt starts, and ``peft_files.py`` PEFT's file format. ``baking.py`` turns a prompt into tokens, with
``lookup_scale.py``; ``nearest_tokens.py`` describes it. The hooks of a live prompt are in ``runtime/prompts/``.
"""
