"""Plugins: the hooks, their validation, the registry, and what is built in.

``hookspecs.py`` is the whole contract; a new hook starts there. ``registry.py`` is data; ``current.py`` alone loads
plugins and says which registry holds in this process.
"""
