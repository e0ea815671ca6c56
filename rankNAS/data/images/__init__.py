"""Labelled images: reading, decoding, normalising, augmenting."""
