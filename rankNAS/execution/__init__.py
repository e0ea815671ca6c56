"""Trials at run time: scheduling, worker processes, early stopping."""
