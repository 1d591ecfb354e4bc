"""From a reference to a merged tree: manifest → layers → TOCs → tree file. All layers of an image are opened in parallel.

Documents are kept by digest in the pool, and the finished tree under the manifest's digest: an image that is known here is
opened again without a request (but for the tag) and without parsing.
"""

from __future__ import annotations

import mmap
import os
import platform as host_platform
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec
import structlog
import trio

from p2pgz.core.digest import Digest
from p2pgz.core.media import (
    Descriptor,
    ImageConfig,
    Index,
    Manifest,
    Platform,
    parse_config,
    parse_manifest_or_index,
    select_platform,
)
from p2pgz.core.ports import ImageSource
from p2pgz.core.reference import Reference
from p2pgz.errors import ImageInvalid, StateError
from p2pgz.fetch.origin import Origin
from p2pgz.fetch.service import ChunkFetcher
from p2pgz.image.layers import LayerOpener, OpenLayer
from p2pgz.image.merge import LayerInput, merge_layers
from p2pgz.image.treefile import TreeFile, build_tree
from p2pgz.pool.pool import Pool, Segment
