"""The demo: teach a small real model a word in one spare row, merge the row, and unmerge it again.

``run.py`` runs the steps: ``base.py`` trains the model on the sentences of ``corpus.py``, ``word.py`` finds a row for
the word, ``training.py`` trains and measures it, ``disk.py`` compares directories. ``report.py`` has the result of each
step; ``cli/demo.py`` prints it.
"""
