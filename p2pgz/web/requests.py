"""What every request about an image begins with."""

from __future__ import annotations

import msgspec


class ImageFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A reference, and the way to its registry."""

    reference: str
    plain_http: bool = False
    platform: str = ""
    ca_file: str = ""
    hosts_dir: str = ""
    user: str = ""
