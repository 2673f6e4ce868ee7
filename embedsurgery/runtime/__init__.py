"""Adapters that are live on a model: the part of embedsurgery that runs inside forward passes.

``attachment.py`` is what a user holds. ``rows/`` has the hooks of row overrides, ``prompts/`` those of soft prompts;
``members.py`` knows the adapters, ``loading.py`` and ``resume.py`` what may be loaded, ``calls.py`` which calls run.
"""
