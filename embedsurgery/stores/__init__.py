"""Places where tables live, all edited by the one `apply` in ``base.py``."""
