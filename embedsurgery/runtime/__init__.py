"""Adapters that are live on a model: the part of embedsurgery that runs inside forward passes.

``attachment.py`` has the `Attachment` that users call, ``members.py`` its adapters. ``rows/`` has the hooks of row
overrides, ``prompts/`` those of soft prompts. ``loading.py``, ``resume.py`` and ``save_warnings.py`` check state dicts
that are loaded and saved, ``nesting.py`` allows one attachment per model, ``peft.py`` follows PEFT's switch, and
``calls.py`` tracks active forward calls.
"""
