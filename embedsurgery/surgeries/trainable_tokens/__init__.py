"""Trainable tokens: a few rows of embedding tables are trained.

``surgery.py`` is the technique, ``config.py`` what a user asks, ``peft_files.py`` PEFT's form. How live rows reach a
forward pass is in ``runtime/rows/``.
"""
