"""Trainable tokens: a few rows of embedding tables are trained."""
