"""Chain ids: one digest for the content of a layer and everything below it (OCI image spec, "Layer ChainID")."""

from __future__ import annotations

from collections.abc import Iterable

from p2pgz.core.digest import Digest


def chain_ids(diff_ids: Iterable[Digest]) -> list[Digest]:
    """The chain id of each layer, bottom layer first."""
    found: list[Digest] = []
    for diff_id in diff_ids:
        found.append(Digest.of(f"{found[-1]} {diff_id}".encode()) if found else diff_id)
    return found
