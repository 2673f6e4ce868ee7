"""Adapters that are live on a model. The part of embedsurgery that runs inside forward passes."""
