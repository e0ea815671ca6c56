"""Strategies that measure layers one at a time."""
