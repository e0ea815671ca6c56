"""Strategies that measure the sensitivity of one layer at a time."""
