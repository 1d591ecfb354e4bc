"""Platforms of images, and which entry of an index suits a machine (OCI image spec 1.1, "Image Index").

The machine is given by the caller: core asks no operating system.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from p2pgz.errors import UsageError

# uname's and people's words for Go's architecture names
_ALIASES = {
    "x86_64": "amd64",
    "x86-64": "amd64",
    "aarch64": "arm64",
    "i386": "386",
    "i486": "386",
    "i586": "386",
    "i686": "386",
    "loongarch64": "loong64",
    "armhf": "arm/v7",
    "armel": "arm/v6",
    "armv5l": "arm/v5",
    "armv6l": "arm/v6",
    "armv7l": "arm/v7",
    "armv8l": "arm/v7",  # a 32-bit process on a 64-bit kernel
}
_BASE_VARIANTS = {
    "amd64": "v1",
    "arm64": "v8",
    "arm": "v7",
}  # what no variant means (containerd's normalisation)
_WORD = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_VARIANT = re.compile(r"v(\d{1,4})(?:\.(\d{1,4}))?")


@dataclass(frozen=True, slots=True)
class Platform:
    """Operating system, architecture and variant, in Go's words, normalised:

    `linux/arm64/v8` is `linux/arm64`.
    """

    os: str
    architecture: str
    variant: str = ""

    @classmethod
    def of(cls, os: str, architecture: str, variant: str = "") -> Platform:
        """The normalised platform."""
        architecture, _, implied = _ALIASES.get(architecture.lower(), architecture.lower()).partition("/")
        variant = variant.lower() or implied
        if variant.isdecimal():
            variant = f"v{variant}"
        return cls(os.lower(), architecture, "" if variant == _BASE_VARIANTS.get(architecture) else variant)

    @classmethod
    def parse(cls, text: str) -> Platform:
        """Parse `OS/ARCH[/VARIANT]`, or `ARCH` for Linux; raises UsageError."""
        parts = text.split("/")
        if len(parts) > 3 or not all(_WORD.fullmatch(part) for part in parts):
            raise UsageError(
                f"{text[:80]!r} is not a platform", hint="OS/ARCH[/VARIANT], like linux/amd64 or linux/arm/v7"
            )
        return cls.of("linux", parts[0]) if len(parts) == 1 else cls.of(*parts)

    @classmethod
    def for_machine(cls, machine: str) -> Platform:
        """The Linux platform of a machine as uname calls it (`x86_64`, `aarch64`, `armv7l`)."""
        return cls.of("linux", machine)

    def __str__(self) -> str:
        return (
            f"{self.os}/{self.architecture}/{self.variant}"
            if self.variant
            else f"{self.os}/{self.architecture}"
        )

    def suits(self, offered: Platform) -> tuple[int, ...] | None:
        """How well something made for `offered` runs here: larger is better, None is not at all.

        A machine of variant vN runs whatever was made for a lower variant of its architecture.
        """
        if (self.os, self.architecture) != (offered.os, offered.architecture):
            return None
        if self.variant == offered.variant:
            return (1 << 30,)
        here, there = self._level(), offered._level()
        return there if here and there and there <= here else None

    def _level(self) -> tuple[int, ...]:
        match = _VARIANT.fullmatch(self.variant or _BASE_VARIANTS.get(self.architecture, ""))
        return (int(match[1]), int(match[2] or 0)) if match else ()
