"""The version, in a file that imports nothing: pyproject.toml reads it too."""

__version__ = "0.1.0"
