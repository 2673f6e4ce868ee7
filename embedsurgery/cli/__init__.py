"""The command line: one file for each command, listed in ``plugins/verbs.py``.

The only package that imports click; rich is imported when a table is drawn. ``main.py`` loads the commands and turns
errors into one line and an exit code. ``options.py`` has shared options and ``merge_options.py`` those of a merge;
``reports.py`` prints shared reports and ``render.py`` draws. ``checkpoints/``, ``hub/`` and ``demo/`` do the work.

Commands import what does the work inside their function, so that ``--help`` loads only click, and a command only the
packages that it uses (``tests/test_import.py``).
"""
