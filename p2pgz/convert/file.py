"""Converting a single layer from file to file; for the command line (`file:LAYER`)."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import BinaryIO, cast

from p2pgz.convert.layer import LayerOptions, Progress, convert_layer
from p2pgz.convert.writer import WrittenLayer
from p2pgz.core.footer import parse_footer
from p2pgz.errors import SourceUnavailable, UsageError

_FOOTER_READ_BYTES = 128


def convert_file(
    source: Path, target: Path, options: LayerOptions, *, progress: Progress | None = None
) -> WrittenLayer:
    """Convert one layer from file to file; the target appears whole or not at all. Blocks: call it in a thread.

    Raises ImageInvalid, and SourceUnavailable for what the file systems refuse.
    """
    options.check()
    if target.exists() and target.samefile(source):
        raise UsageError(f"{source} is source and target", hint="write to another name, then rename it")
    try:
        blob = source.open("rb")
    except OSError as error:
        raise SourceUnavailable(f"{source}: {error.strerror}") from error
    with blob:
        try:
            return _convert_to(blob, target, options, progress)
        except OSError as error:
            raise SourceUnavailable(
                f"{source} to {target}: {error.strerror}", hint="nothing was left behind at the target"
            ) from error


def _convert_to(
    blob: BinaryIO, target: Path, options: LayerOptions, progress: Progress | None
) -> WrittenLayer:
    size = os.fstat(blob.fileno()).st_size
    blob.seek(max(0, size - _FOOTER_READ_BYTES))
    rewritten = parse_footer(blob.read(), size) is not None
    blob.seek(0)
    with tempfile.NamedTemporaryFile(prefix=f".{target.name}.", dir=target.parent, delete=False) as out:
        try:
            written = convert_layer(
                blob,
                cast("BinaryIO", out),
                options,
                progress=progress,
                rewritten=rewritten,
                scratch_directory=target.parent,
            )
            out.flush()
            os.fsync(out.fileno())
            Path(out.name).chmod(0o644)
            Path(out.name).replace(target)
        except BaseException:
            Path(out.name).unlink(missing_ok=True)
            raise
    return written
