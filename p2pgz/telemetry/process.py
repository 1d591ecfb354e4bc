"""What this process itself takes: memory, descriptors, tasks. For the status document; some milliseconds at most.

Whoever runs a node for months looks at these for leaks, as `make soak` does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import trio

_STATUS: Final = Path("/proc/self/status")
_DESCRIPTORS: Final = Path("/proc/self/fd")


def figures() -> dict[str, Any]:
    """Of the process, and of the trio run that this is called in."""
    return {
        "memory_bytes": anonymous_bytes(_STATUS.read_text("ascii", "replace")),
        "open_files": sum(1 for _ in _DESCRIPTORS.iterdir()),
        "tasks": task_count(),
    }


def anonymous_bytes(status: str) -> int:
    """RssAnon of a process's status file (proc(5)): without the pool's pages, which the kernel takes back as it likes."""
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    return 0


def task_count() -> int:
    """Tasks of the running event loop."""
    root = trio.lowlevel.current_root_task()
    found, todo = 0, [root] if root is not None else []
    while todo:
        task = todo.pop()
        found += 1
        for nursery in task.child_nurseries:
            todo.extend(nursery.child_tasks)
    return found
