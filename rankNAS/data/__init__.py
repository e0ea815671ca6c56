"""Data sets: reading, splitting, batching."""

from rankNAS.data.loading import Data, load_data

__all__ = ["Data", "load_data"]
