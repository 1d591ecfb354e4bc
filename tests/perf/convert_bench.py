"""CPU time, wall time, memory and size of converting one layer, beside the reference library's writer.

    python tests/perf/convert_bench.py LAYER.tar.gz [--reference tests/interop/estargz_reader/estargz_reader]

The reference is the program of tests/interop/estargz_reader (`go build` there); its level is Go's gzip 6. Every run is a
process of its own, so interpreter start counts. CPU time is user + system; runs alternate, the median of each is shown.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONVERT = (
    "import sys; from pathlib import Path; from p2pgz.convert.file import convert_file; "
    "from p2pgz.convert.layer import LayerOptions; "
    "convert_file(Path(sys.argv[1]), Path(sys.argv[2]), LayerOptions(format=sys.argv[3], threads=int(sys.argv[4])))"
)


def run(command: list[str], out: Path) -> tuple[float, float, float, int]:
    """(CPU seconds, wall seconds, peak MB, bytes written)"""
    start = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{command[0]} failed")
    wall = time.monotonic() - start
    return usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss / 1024, out.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("layer", type=Path)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "out"
        python = [sys.executable, "-c", CONVERT, str(arguments.layer), str(out)]
        commands = {
            "p2pgz estargz": [*python, "estargz", "2"],
            "p2pgz estargz, 1 thread": [*python, "estargz", "1"],
            "p2pgz zstd:chunked": [*python, "zstd:chunked", "2"],
            "p2pgz zstd:chunked-stargz": [*python, "zstd:chunked-stargz", "2"],
        }
        if arguments.reference:
            commands["reference -6"] = [
                str(arguments.reference),
                "build",
                str(arguments.layer),
                str(out),
                "6",
                str(1 << 20),
            ]
        results = {name: [] for name in commands}
        for _ in range(arguments.runs):
            for name, command in commands.items():
                results[name].append(run(command, out))
    print(f"{'':26}{'cpu s':>8}{'wall s':>8}{'MB':>7}{'out bytes':>12}")
    for name, rows in results.items():
        cpu, wall, memory, size = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"{name:26}{cpu:8.2f}{wall:8.2f}{memory:7.0f}{size:12.0f}")


if __name__ == "__main__":
    main()
