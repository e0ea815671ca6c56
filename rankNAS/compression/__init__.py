"""Compression: from a model and its space to statistics, factors and compressed networks."""
