"""Contract suites for plug-ins, and small problems to test with."""

from rankNAS.testing.contracts import *  # noqa: F403
from rankNAS.testing.contracts import __all__ as __all__
