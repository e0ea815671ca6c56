"""Strategies that solve for their allocation at once."""
