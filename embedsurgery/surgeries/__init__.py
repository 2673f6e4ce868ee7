"""The built-in surgeries, one technique to a file; they register through the same hooks as a plugin's."""
