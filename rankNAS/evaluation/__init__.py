"""Allocation to metrics."""
