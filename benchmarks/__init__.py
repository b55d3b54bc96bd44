"""Measured comparisons of sparse_ft with what else one would do."""
