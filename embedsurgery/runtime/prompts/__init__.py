"""Soft prompts in forward passes: hooks that put virtual tokens in front of the input."""
