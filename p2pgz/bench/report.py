"""What was measured, as one document, as tables, and as a picture."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from p2pgz.bench.reads import KINDS, Read
from p2pgz.bench.stages import Stage
from p2pgz.bench.start import SOURCES, Run
from p2pgz.errors import UsageError


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def document(stages: Sequence[Stage], runs: Sequence[Run], reads: Sequence[Read]) -> dict[str, Any]:
    """The document of `p2pgz bench --json`: seconds, bytes, bytes per second."""
    result: dict[str, Any] = {}
    if stages:
        result["stages"] = {stage.name: round(stage.bytes_per_second) for stage in stages}
    if runs:
        result["start"] = {
            source: {
                "runs": len(mine),
                "mount_seconds": spread([run.mount_seconds for run in mine]),
                "ready_seconds": spread([run.ready_seconds for run in mine]),
                "registry_bytes": max(run.registry_bytes for run in mine),
                "registry_requests": max(run.registry_requests for run in mine),
                "peer_bytes": max(run.peer_bytes for run in mine),
            }
            for source in SOURCES
            if (mine := [run for run in runs if run.source == source])
        }
    if reads:
        grouped: dict[tuple[bool, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for read in reads:
            grouped[read.cold, read.kind][read.system].append(read.seconds)
        result["reads"] = [
            {
                "kind": kind,
                "cold": cold,
                "mount_seconds": spread(grouped[cold, kind]["mount"]),
                "disk_seconds": spread(grouped[cold, kind]["disk"]),
                "ratio": statistics.median(grouped[cold, kind]["mount"])
                / statistics.median(grouped[cold, kind]["disk"]),
            }
            for cold in (True, False)
            for kind in KINDS
            if (cold, kind) in grouped
        ]
    return result


def tables(result: dict[str, Any]) -> str:
    """The document for people."""
    lines: list[str] = []
    if "stages" in result:
        lines += ["stages, one core                 MB/s"]
        lines += [f"  {name:26}{rate / 1e6:10.0f}" for name, rate in result["stages"].items()]
    if "start" in result:
        lines += [
            "",
            "cold start        mounted s   ready s (range)            registry MB  requests  peers MB",
        ]
        for source, row in result["start"].items():
            ready = row["ready_seconds"]
            lines.append(
                f"  {source:14}{row['mount_seconds']['median']:11.2f}{ready['median']:10.2f}"
                f" ({ready['min']:.2f} to {ready['max']:.2f}){row['registry_bytes'] / 1e6:18.1f}"
                f"{row['registry_requests']:10}{row['peer_bytes'] / 1e6:10.1f}"
            )
    if "reads" in result:
        lines += ["", "reads, all bytes here       mount s    disk s     ratio"]
        for row in result["reads"]:
            name = f"{row['kind']}, {'cold' if row['cold'] else 'warm'}"
            lines.append(
                f"  {name:22}{row['mount_seconds']['median']:11.3f}{row['disk_seconds']['median']:10.3f}{row['ratio']:10.2f}"
            )
    return "\n".join(lines).strip("\n")


def check_plot(path: Path) -> None:
    """Before anything is measured: whether a picture could be drawn. Raises UsageError."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "--plot needs matplotlib, which is not installed", hint="pip install 'p2pgz[plot]'"
        ) from error
    if path.suffix.lower() not in {".png", ".svg"}:
        raise UsageError(f"--plot {path}: the name must end in .png or .svg")
    if not path.parent.is_dir():
        raise UsageError(f"--plot {path}: there is no folder {path.parent}")


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars for each part that was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = [name for name in ("start", "reads", "stages") if name in result]
    figure, axes = pyplot.subplots(len(parts), 1, figsize=(8, 2.6 * len(parts)), squeeze=False)
    for axis, part in zip(axes[:, 0], parts, strict=True):
        if part == "start":
            names = list(result[part])
            axis.barh(names, [result[part][name]["ready_seconds"]["median"] for name in names])
            axis.set_xlabel("seconds from `p2pgz mount` with an empty pool until ready (median)")
        elif part == "reads":
            names = [f"{row['kind']}, {'cold' if row['cold'] else 'warm'}" for row in result[part]]
            axis.barh(names, [row["ratio"] for row in result[part]])
            axis.axvline(1.0, color="black", linewidth=0.8)
            axis.set_xlabel("time through the mount, beside the local disk (1 = the same)")
        else:
            names = list(result[part])
            axis.barh(names, [result[part][name] / 1e6 for name in names])
            axis.set_xlabel("MB/s on one core")
        axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
