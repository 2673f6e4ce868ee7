"""The verbs that are built in."""

from __future__ import annotations

VERBS = {
    "inspect": "The embedding tables of a checkpoint: names, ties, rows, shards.",
    "show": "What an adapter holds, and whether it fits a model.",
    "merge": "Bake adapters into a checkpoint on disk, without loading it.",
    "unmerge": "Take the last merge out again, or another, bit for bit.",
    "log": "The merges that a checkpoint records.",
    "verify": "Check a checkpoint; exits 1 and names what disagrees.",
    "tokens": "New tokens for a checkpoint: tokens add.",
    "extract": "The rows that full tuning changed, as an adapter.",
    "recover": "Finish or roll back what a crash left of a change.",
    "push": "Put an adapter on the Hugging Face Hub.",
    "pull": "Get an adapter from the Hugging Face Hub.",
    "plugins": "The plugins that are installed, and what each brings.",
    "demo": "The whole path on a small real model, in under a minute.",
}
"""Verb -> its line in the list; the verb's own file is ``cli/VERB.py`` with a command called ``command``."""
