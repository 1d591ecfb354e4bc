"""Images where they lie: registries, OCI layouts and their archives, behind `core.ports.ImageSource` and `ImageSink`.

`open_source` and `open_sink` are the doors. Only this package imports the HTTP client.
"""

from p2pgz.registry.opening import open_sink, open_source
from p2pgz.registry.options import RegistryOptions, RegistryStats, RetryPolicy

__all__ = ["RegistryOptions", "RegistryStats", "RetryPolicy", "open_sink", "open_source"]
