"""Attention in all its kinds, positions, and the cache of keys and values."""
