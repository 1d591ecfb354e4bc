"""p2pgz: lazy, verified, peer-to-peer distribution of stargz container images.

This module imports nothing, so that `p2pgz --version` and `--help` stay fast.
"""

__version__ = "0.1.0"
