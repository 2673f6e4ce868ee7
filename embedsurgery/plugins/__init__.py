"""Plugins: the hooks, their validation, the registry, and the built-in records.

``hookspecs.py`` is the whole contract; a new hook starts there. ``checks.py`` validates what hooks return,
``discovery.py`` loads plugins, ``registry.py`` looks things up, and ``current.py`` holds this process's registry.

Imports inside functions keep torch, pluggy and the surgeries out of commands that do not need them.
"""
