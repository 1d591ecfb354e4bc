"""CPU time and output size of `p2pgz convert` beside another converter, the same image and chunk size, alternating runs.

    python tests/perf/convert_beside.py --source oci:DIR:TAG --level 6 --chunk-size 4194304 --runs 3 \
        --other 'stargzctl SOCK convert REF NEW LEVEL' --other-daemon PID --other-bytes 'ctr ... size command'

In `--other`, LEVEL and NEW are replaced by the level and by a name not used before. The CPU time of its daemon (the content
store it writes to) is counted, as user+sys of both from /proc. `--other-bytes` prints the bytes of its layers (NEW is
replaced). Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TICKS = os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--source", required=True)
    parser.add_argument("--level", type=int, required=True)
    parser.add_argument("--chunk-size", type=int, required=True)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--other", required=True)
    parser.add_argument("--other-daemon", type=int, default=0)
    parser.add_argument("--other-bytes", required=True)
    options = parser.parse_args()
    rows: dict[str, list[dict[str, float]]] = {"p2pgz": [], "other": []}
    for run in range(options.runs):
        rows["other"].append(other(options, run))
        rows["p2pgz"].append(ours(options))
        print({name: found[-1] for name, found in rows.items()}, file=sys.stderr, flush=True)
    cpu = {name: statistics.median(row["cpu_s"] for row in found) for name, found in rows.items()}
    size = {name: found[-1]["bytes"] for name, found in rows.items()}
    print(
        json.dumps(
            {
                "level": options.level,
                "runs": options.runs,
                "cpu_s": cpu,
                "cpu_ratio": round(cpu["p2pgz"] / cpu["other"], 3),
                "bytes": size,
                "size_ratio": round(size["p2pgz"] / size["other"], 4),
                "rows": rows,
            }
        )
    )


def ours(options: Any) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        command = [
            *(sys.executable, "-m", "p2pgz", "convert", "--quiet", "--force"),
            *("--chunk-size", str(options.chunk_size), options.source, f"oci:{folder}/out:t"),
        ]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
        return {"cpu_s": round(cpu, 2), "bytes": layer_bytes(Path(folder) / "out")}


def layer_bytes(layout: Path) -> int:
    """All layers of the one image in a layout."""
    index = json.loads((layout / "index.json").read_text())
    document = index["manifests"][0]
    while True:
        manifest = json.loads((layout / "blobs" / "sha256" / document["digest"].split(":")[1]).read_text())
        if "layers" in manifest:
            return sum(layer["size"] for layer in manifest["layers"])
        document = manifest["manifests"][0]


def other(options: Any, run: int) -> dict[str, float]:
    new = f"localhost/beside:l{options.level}r{run}p{os.getpid()}"
    command = shlex.split(options.other.replace("LEVEL", str(options.level)).replace("NEW", new))
    daemon = daemon_cpu(options.other_daemon)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    cpu += daemon_cpu(options.other_daemon) - daemon
    printed = subprocess.run(
        shlex.split(options.other_bytes.replace("NEW", new)), check=True, capture_output=True, text=True
    )
    return {"cpu_s": round(cpu, 2), "bytes": int(printed.stdout)}


def daemon_cpu(pid: int) -> float:
    if not pid:
        return 0.0
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


if __name__ == "__main__":
    main()
