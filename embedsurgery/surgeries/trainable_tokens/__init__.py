"""Trainable tokens: a few rows of embedding tables are trained.

``surgery.py`` is the technique, ``config.py`` the user's config, and ``peft_files.py`` PEFT's file format. The rows are
live in a forward pass through ``runtime/rows/``.
"""
