"""Samplers and tree search."""
