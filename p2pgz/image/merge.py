"""Layers merged into one tree, as a full pull leaves them on a disk (OCI image spec, "Layer changesets").

Called when an image is opened. Pure functions of the layers' TOCs: no bytes of files, no recursion (trees may
be deep), time in proportion to the TOCs' bytes whatever they say. Nothing a layer says can reach outside the
root.

Where pulling tools disagree, these are the answers: whiteouts and opaque markers hide lower layers only,
wherever they stand in their layer; a directory that a layer only implies keeps the lower directory's
attributes; a path through a symlink of a lower layer follows it inside the root; attributes of a hard link's
header are ignored. A layer that puts an entry below a file or symlink of its own is refused.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Final, NamedTuple

from p2pgz.core.digest import Digest
from p2pgz.core.layout import FileExtent
from p2pgz.core.model import Entry, Toc
from p2pgz.errors import ImageInvalid

WHITEOUT_PREFIX: Final = b".wh."
OPAQUE_NAME: Final = b".wh..wh..opq"
AUFS_PREFIX: Final = b".wh..wh."  # aufs kept its own books under such names; the spec reserves them
SYMLINKS_MAX: Final = 40  # as Linux (MAXSYMLINKS)
# Components of symlink targets walked in one merge. A real image needs a few thousand; without a limit a TOC
# of 100 MB could ask for hours.
LINK_STEPS_MAX: Final = 1_000_000
PATH_COPIED_PER_STEP: Final = 64  # copying so many components of a path costs about one step
IMPLIED: Final = -1


class LayerInput(NamedTuple):
    """One layer to merge: its TOC, where its files lie (`SegmentLayout.extents`), and its segment's id."""

    toc: Toc
    extents: dict[int, FileExtent]
    segment: Digest


class Directory:
    """A directory of the merged tree.

    `entry` is the number of the entry that describes it, or IMPLIED. `children` maps names to directories, or
    to the entry number of anything else; names that share a number are hard links of one inode.
    """

    __slots__ = ("children", "entry")

    def __init__(self, entry: int = IMPLIED) -> None:
        self.children: dict[bytes, Directory | int] = {}
        self.entry = entry


class MergedTree:
    """The merged tree. Entries of all layers are numbered through, bottom layer first."""

    def __init__(self, layers: list[LayerInput]) -> None:
        self.layers = layers
        self.root = Directory()
        self.entries: list[Entry] = []
        self.linked: set[int] = set()
        """numbers of entries that hard links were made to"""
        self.warnings: list[str] = []
        self._starts: list[int] = []

    def add_layer(self, entries: list[Entry]) -> int:
        """Number the entries of the next layer; returns the first number."""
        start = len(self.entries)
        self._starts.append(start)
        self.entries += entries
        return start

    def extent(self, number: int) -> tuple[Digest, FileExtent] | None:
        """The segment and place of a file's bytes; None for what has none."""
        at = bisect_right(self._starts, number) - 1
        layer = self.layers[at]
        extent = layer.extents.get(number - self._starts[at])
        return None if extent is None else (layer.segment, extent)


def merge_layers(layers: list[LayerInput]) -> MergedTree:
    """Merge layers, bottom layer first.

    Raises ImageInvalid when a layer contradicts itself or links to what is not there.
    """
    tree = MergedTree(layers)
    steps = _Steps()
    for index, layer in enumerate(layers):
        _Applier(tree, layer.toc.entries, f"layer {index + 1} of {len(layers)}", steps).apply()
        tree.warnings += layer.toc.warnings
    return tree


class _Steps:
    """How many components of symlink targets may still be walked."""

    __slots__ = ("left",)

    def __init__(self) -> None:
        self.left = LINK_STEPS_MAX


class _Applier:
    """Applies one layer to a tree."""

    def __init__(self, tree: MergedTree, entries: list[Entry], where: str, steps: _Steps) -> None:
        self._tree = tree
        self._entries = entries
        self._where = where
        self._steps = steps
        self._first = tree.add_layer(entries)
        self._own_kinds: dict[bytes, str] | None = None
        self._directories: dict[bytes, Directory] = {b"": tree.root}

    def apply(self) -> None:
        """Hide what the layer hides, then add what it has, then make its hard links."""
        tree, directories = self._tree, self._directories
        hidden = self._apply_whiteouts()
        pending: list[tuple[Directory, bytes, int]] = []
        for number, entry in enumerate(self._entries, self._first):
            if hidden and number in hidden:
                continue
            head, _, name = entry.name.rpartition(b"/")
            directory = directories.get(head)
            if directory is None:
                directory = self._make_directory(head)
            children = directory.children
            kind = entry.kind
            if kind == "dir":
                if not name:
                    tree.root.entry = number
                    continue
                old = children.get(name)
                if isinstance(old, Directory):
                    old.entry = number
                    continue
                if old is not None:
                    self._forget_paths()
                children[name] = Directory(number)
                continue
            if not name:
                raise ImageInvalid(f"{self._where}: the root is a {kind}, not a directory")
            old = children.get(name)
            if old is not None and (isinstance(old, Directory) or tree.entries[old].kind == "symlink"):
                self._forget_paths()
            if kind == "hardlink":
                target = self._placed_before(entry.link) if entry.link != entry.name else None
                if target is None:
                    pending.append((directory, name, number))
                else:
                    tree.linked.add(target)
                    number = target
            children[name] = number
        if pending:
            self._make_links(pending)

    # Whiteouts

    def _apply_whiteouts(self) -> set[int]:
        """Remove what this layer hides from the tree, which has only lower layers yet; its markers."""
        hidden: set[int] = set()
        for number, entry in enumerate(self._entries, self._first):
            if WHITEOUT_PREFIX not in entry.name:
                continue
            head, _, name = entry.name.rpartition(b"/")
            if any(part.startswith(AUFS_PREFIX) for part in head.split(b"/")):
                hidden.add(number)
                continue
            if not name.startswith(WHITEOUT_PREFIX):
                continue
            hidden.add(number)
            if name == OPAQUE_NAME:
                directory = self._find_lower(head)
                if directory is not None:
                    directory.children.clear()
            elif not name.startswith(AUFS_PREFIX):
                target = name[len(WHITEOUT_PREFIX) :]
                directory = self._find_lower(head) if target not in (b"", b".", b"..") else None
                if directory is not None:
                    directory.children.pop(target, None)
        return hidden

    def _find_lower(self, path: bytes) -> Directory | None:
        """The directory that a marker's path means in the lower layers, if there is one."""
        trail = [self._tree.root]
        parts = path.split(b"/") if path else []
        for n, part in enumerate(parts):
            child = trail[-1].children.get(part)
            if isinstance(child, Directory):
                trail.append(child)
                continue
            if child is None or self._own_kind(parts, n):
                return None  # what this layer puts there has nothing of lower layers below it
            followed = self._follow(trail, child, make=False)
            if followed is None:
                return None
            trail = followed
        return trail[-1]

    # Directories

    def _make_directory(self, path: bytes) -> Directory:
        """The directory in which entries below `path` are put; missing ones are implied."""
        head, _, name = path.rpartition(b"/")
        parent = self._directories.get(head)
        if parent is not None:
            child = parent.children.get(name)
            if child is None:
                child = parent.children[name] = Directory()
            if isinstance(child, Directory):
                self._directories[path] = child
                return child
        trail = [self._tree.root]
        parts = path.split(b"/")
        for n, part in enumerate(parts):
            children = trail[-1].children
            child = children.get(part)
            if isinstance(child, int):
                trail = self._replace_or_follow(trail, parts, n, child)
                continue
            if child is None:
                child = children[part] = Directory()
            trail.append(child)
        self._directories[path] = trail[-1]
        return trail[-1]

    def _forget_paths(self) -> None:
        """Something on the way of paths was replaced: they may lead elsewhere now, and are looked up again."""
        self._directories.clear()
        self._directories[b""] = self._tree.root

    def _replace_or_follow(
        self, trail: list[Directory], parts: list[bytes], n: int, number: int
    ) -> list[Directory]:
        """Where a path goes on from a non-directory: in a new directory, or where a link leads."""
        if number >= self._first:
            path = b"/".join(parts[: n + 1])
            kind = self._tree.entries[number].kind
            raise ImageInvalid(f"{self._where}: has entries below {_shown(path)}, which it says is a {kind}")
        if self._tree.entries[number].kind == "symlink" and self._own_kind(parts, n) != "dir":
            followed = self._follow(trail, number, make=True)
            if followed is not None:
                return followed
            path = b"/".join(parts[: n + 1])
            self._tree.warnings.append(
                f"{self._where}: symlink {_shown(path)} leads to no directory; a directory replaces it"
            )
        made = trail[-1].children[parts[n]] = Directory()
        return [*trail, made]

    def _own_kind(self, parts: list[bytes], n: int) -> str:
        """What this layer itself says about a path (the last word counts); empty if nothing."""
        self._spend(n // PATH_COPIED_PER_STEP)
        if self._own_kinds is None:
            self._own_kinds = {entry.name: entry.kind for entry in self._entries}
        return self._own_kinds.get(b"/".join(parts[: n + 1]), "")

    def _follow(self, trail: list[Directory], number: int, *, make: bool) -> list[Directory] | None:
        """The directory a symlink in `trail[-1]` leads to, as a trail from the root; None if there is none.

        With `make`, directories that are missing on the way are implied, as a full pull does.
        """
        if self._tree.entries[number].kind != "symlink":
            return None
        trail = trail.copy()
        made: list[tuple[Directory, bytes, Directory]] = []
        todo: list[bytes] = []
        links = 0
        child: Directory | int | None = number
        while True:
            if isinstance(child, Directory):
                trail.append(child)
            elif child is not None:
                entry = self._tree.entries[child]
                links += 1
                if entry.kind != "symlink" or links > SYMLINKS_MAX:
                    return None
                if entry.link.startswith(b"/"):
                    del trail[1:]
                parts = entry.link.split(b"/")
                self._spend(len(parts) + len(trail) // PATH_COPIED_PER_STEP)
                todo += parts[::-1]
            if not todo:
                break
            name = todo.pop()
            child = None
            if name == b"..":
                if len(trail) > 1:
                    trail.pop()
            elif name not in (b"", b"."):
                child = trail[-1].children.get(name)
                if child is None:
                    if not make:
                        return None
                    child = Directory()
                    made.append((trail[-1], name, child))
        for parent, name, directory in made:
            parent.children[name] = directory
        return trail

    def _spend(self, steps: int) -> None:
        self._steps.left -= steps
        if self._steps.left < 0:
            raise ImageInvalid(
                f"{self._where}: its paths lead through too many symlinks",
                hint=f"at most {LINK_STEPS_MAX} components of symlink targets are followed in an image",
            )

    # Hard links

    def _placed_before(self, target: bytes) -> int | None:
        """What this layer has put at `target` so far: a link keeps it though the name be written again."""
        head, _, name = target.rpartition(b"/")
        directory = self._directories.get(head)
        child = None if directory is None else directory.children.get(name)
        if isinstance(child, int) and child >= self._first and self._tree.entries[child].kind != "hardlink":
            return child
        return None

    def _make_links(self, pending: list[tuple[Directory, bytes, int]]) -> None:
        """Make the links whose targets come later, are in a lower layer, or are such links themselves."""
        resolved: dict[int, int] = {}
        attached: set[int] | None = None
        # by number of the link: a later entry may have replaced it, or a directory on the way to it
        standing = [link for link in pending if link[0].children.get(link[1]) == link[2]]
        for directory, _, number in standing:
            try:
                self._resolve(number, resolved)
            except ImageInvalid:
                attached = attached or self._attached()
                if id(directory) in attached:
                    raise
        for directory, name, number in standing:
            if number in resolved:
                directory.children[name] = resolved[number]
                self._tree.linked.add(resolved[number])

    def _resolve(self, number: int, resolved: dict[int, int]) -> None:
        """Find the inode that a chain of links ends at, and note it for all of them."""
        entries = self._tree.entries
        chain: dict[int, None] = {}
        while entries[number].kind == "hardlink" and number not in resolved:
            if number in chain:
                raise ImageInvalid(f"{self._where}: hard link {_shown(entries[number].name)} leads to itself")
            chain[number] = None
            number = self._find_target(entries[number])
        number = resolved.get(number, number)
        for link in chain:
            resolved[link] = number

    def _attached(self) -> set[int]:
        """The ids of the directories that are in the tree; what was replaced is not."""
        found = [self._tree.root]
        for directory in found:
            found += [child for child in directory.children.values() if isinstance(child, Directory)]
        return {id(directory) for directory in found}

    def _find_target(self, entry: Entry) -> int:
        head, _, name = entry.link.rpartition(b"/")
        directory = self._directories.get(head) or self._find_any(head)
        child = None if directory is None else directory.children.get(name)
        if isinstance(child, int):
            return child
        what = "which is not there" if child is None and name else "which is a directory"
        raise ImageInvalid(
            f"{self._where}: {_shown(entry.name)} is a hard link to {_shown(entry.link)}, {what}"
        )

    def _find_any(self, path: bytes) -> Directory | None:
        """The directory at `path` as the tree is now, symlinks followed inside the root."""
        trail = [self._tree.root]
        for part in path.split(b"/") if path else []:
            child = trail[-1].children.get(part)
            if isinstance(child, Directory):
                trail.append(child)
                continue
            followed = None if child is None else self._follow(trail, child, make=False)
            if followed is None:
                return None
            trail = followed
        self._directories[path] = trail[-1]
        return trail[-1]


def _shown(path: bytes) -> str:
    return repr(path[:200].decode(errors="backslashreplace")) if path else "the root"
