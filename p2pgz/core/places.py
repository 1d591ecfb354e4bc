"""Where each value of a configuration came from, and the error that tells all that is wrong with it. Called by `config`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from p2pgz.core.structcheck import Mistake
from p2pgz.core.tomllines import key_lines
from p2pgz.errors import ConfigError

DEFAULT_HINT: Final = "`p2pgz config default` prints every key with its default"
_ITEM: Final = re.compile(r"\[\d+\].*")


class Places(NamedTuple):
    """The file, its text, and for each key that was set by what: `file`, `environment` or `flag`."""

    path: str
    text: str
    origins: Mapping[str, str]
    environment_prefix: str

    def of(self, key: str) -> str:
        """The file and line of a key, or what else set it."""
        name = _ITEM.sub("", key)
        inside = (other for other in self.origins if other.startswith(f"{key}."))
        setter = name if name in self.origins else next(inside, name)
        origin = self.origins.get(setter)
        if origin == "environment":
            return f"environment variable {self.environment_prefix}{setter.replace('.', '__').upper()}"
        if origin == "flag":
            return "command line"
        lines = key_lines(self.text)
        while key and key not in lines:  # what is missing stands nowhere: the table that it should be in does
            key = key.rpartition(".")[0]
        return f"{self.path}:{lines[key]}" if key else self.path

    def error(self, found: Sequence[Mistake]) -> ConfigError:
        """All mistakes in one error."""
        lines = [f"{self.of(key)}: {key}: {message}" for key, message, _ in found]
        hints = [hint for _, _, hint in found]
        if len(found) == 1:
            return ConfigError(lines[0], hint=hints[0] or DEFAULT_HINT)
        told = [f"{line} ({hint})" if hint else line for line, hint in zip(lines, hints, strict=True)]
        return ConfigError(
            "\n  ".join([f"{len(found)} mistakes in the configuration:", *told]), hint=DEFAULT_HINT
        )
