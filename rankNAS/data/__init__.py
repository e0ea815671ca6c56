"""Data sets: reading, splitting, batching."""

from rankNAS.data.base import Data
from rankNAS.data.loading import load_data

__all__ = ["Data", "load_data"]
