"""Soft prompts: trained vectors in front of the embedded input."""
