"""Converting needs the same memory for any size of layer."""

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

LAYER_BYTES = 600_000_000
FILE_BYTES = 20_000_000
PEAK_LIMIT_KIB = 200 << 10

CONVERT = """
import re, sys
from pathlib import Path
from p2pgz.convert.file import convert_file
from p2pgz.convert.layer import LayerOptions
written = convert_file(Path(sys.argv[1]), Path(sys.argv[2]), LayerOptions(level=1))
# not ru_maxrss: that begins with what the process that started this one had
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
print(written.stream_bytes, peak[1])
"""


@pytest.mark.slow
def test_large_layer_is_converted_in_bounded_memory(tmp_path: Path) -> None:
    source = tmp_path / "layer.tar"
    pattern = bytes(range(256)) * (FILE_BYTES // 256)
    with tarfile.open(source, "w", format=tarfile.PAX_FORMAT) as tar:
        for n in range(LAYER_BYTES // FILE_BYTES):
            member = tarfile.TarInfo(f"file{n}")
            member.size = len(pattern)
            tar.addfile(member, io.BytesIO(pattern))
        for n in range(5000):
            tar.addfile(tarfile.TarInfo(f"small/{n}"))
    command = [sys.executable, "-c", CONVERT, source, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    stream_bytes, peak_kib = map(int, done.stdout.split())
    assert stream_bytes > LAYER_BYTES
    assert peak_kib < PEAK_LIMIT_KIB
