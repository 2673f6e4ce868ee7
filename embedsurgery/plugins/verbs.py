"""The built-in commands."""

from __future__ import annotations

VERBS = {
    "inspect": "Show the embedding tables of a checkpoint: names, ties, rows, shards.",
    "show": "Show what an adapter holds, and whether it fits a model.",
    "merge": "Bake adapters into a checkpoint on disk, without loading it.",
    "unmerge": "Undo the last merge, or another, bit for bit.",
    "log": "List the merges that a checkpoint records.",
    "verify": "Check a checkpoint; exits 1 and names what disagrees.",
    "tokens": "Add tokens to a checkpoint: tokens add.",
    "extract": "Extract the rows that full tuning changed, as an adapter.",
    "recover": "Finish or roll back a change that was interrupted.",
    "push": "Push an adapter to the Hugging Face Hub.",
    "pull": "Pull an adapter from the Hugging Face Hub.",
    "plugins": "List the installed plugins, and what each brings.",
    "demo": "Run the whole workflow on a small real model, in under a minute.",
}
"""Name -> its line in the list of commands. Each is ``command`` in ``cli/NAME.py``."""
