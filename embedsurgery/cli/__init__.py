"""The command line: one file a verb, listed in ``plugins/verbs.py``.

The only place that imports click; rich is imported when a table is drawn. ``options.py`` has the options that verbs
share, ``render.py`` what they print with. The work is done by ``checkpoints/``, ``models/`` and ``hub/``.
"""
