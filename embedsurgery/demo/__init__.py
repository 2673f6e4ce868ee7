"""The demo: a small real model, a new word in one spare row, and the whole path of that row there and back.

``corpus.py`` has the sentences, ``base.py`` makes the checkpoint, ``word.py`` finds a row for the word, ``training.py``
trains and measures, ``disk.py`` compares directories, and ``run.py`` puts them together.
"""
