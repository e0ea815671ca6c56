"""``python -m rankNAS``."""

from __future__ import annotations

from rankNAS.cli import main

if __name__ == "__main__":
    main()
