"""Exact allocation under budgets: mixed-integer programmes and Pareto filters."""
