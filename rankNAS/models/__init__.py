"""Trained models and compressed networks on disk."""
