"""Compression of a model to a stated budget, on unlabelled items only."""
