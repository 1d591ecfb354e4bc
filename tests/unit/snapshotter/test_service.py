"""The snapshots service on a real directory, with a node that is told what to do: every answer containerd goes by."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from p2pgz.errors import (
    ImageInvalid,
    MountUnavailable,
    NodeUnavailable,
    SnapshotError,
    StateError,
    StateInUse,
)
from p2pgz.snapshotter import records
from p2pgz.snapshotter.images import SNAPSHOT_REF
from p2pgz.snapshotter.service import LABEL_MAX_BYTES, Snapshotter
from tests.unit.snapshotter.fake_images import MANIFEST, REF, FakeImages, chain, labels


class Host:
    """A snapshotter on a root, and its node."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images = FakeImages()
        self.service = Snapshotter(root, self.images)

    def files(self) -> list[str]:
        """What is on the disk, by records and directories."""
        return sorted(
            str(path.relative_to(self.root))
            for name in ("records", "snapshots")
            for path in (self.root / name).iterdir()
        )

    def pulled(self) -> None:
        """Both layers of the image, as a puller asks for them."""
        for number, parent in ((1, ""), (2, chain(1))):
            assert (
                refused(lambda n=number, p=parent: self.service.prepare(f"extract-{n}", p, labels(n)))
                == "ALREADY_EXISTS"
            )


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path / "root")
    with host.service.opened():
        yield host


def refused(call: Any) -> str:
    with pytest.raises(SnapshotError) as caught:
        call()
    return caught.value.status


class TestLazy:
    def test_a_layer_is_committed_under_its_chain_id_and_the_last_one_is_mounted(self, host: Host) -> None:
        host.pulled()
        first, second = host.service.stat(chain(1)), host.service.stat(chain(2))
        assert (first.kind, first.parent, second.kind, second.parent) == (
            "committed",
            "",
            "committed",
            chain(1),
        )
        assert second.labels[SNAPSHOT_REF] == chain(2)
        assert "containerd.io/snapshot/remote" in second.labels
        assert [(lazy.layers, path.parent.name) for lazy, path in host.images.mounted] == [
            (2, str(second.id))
        ]
        assert host.images.mounted[0][0].reference == f"{REF}@{MANIFEST}"
        assert host.service.usage(chain(2)).bytes == 0
        assert host.images.reasons == []

    def test_containerd_finds_what_was_committed_by_its_filter(self, host: Host) -> None:
        host.pulled()
        found = host.service.walk([f'labels."{SNAPSHOT_REF}"=={chain(2)},parent=="{chain(1)}"'])
        assert [snapshot.name for snapshot in found] == [chain(2)]

    def test_the_second_puller_is_told_at_once(self, host: Host) -> None:
        host.pulled()
        host.pulled()
        assert len(host.images.finds) == 2

    def test_pullers_at_the_same_time_make_it_once(self, host: Host) -> None:
        gate = threading.Barrier(2, timeout=30)
        host.images.before_find = lambda: None
        answers: list[str] = []

        def pull(key: str) -> None:
            gate.wait()
            answers.append(refused(lambda: host.service.prepare(key, "", labels(1))))

        threads = [threading.Thread(target=pull, args=(f"extract-{n}",)) for n in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == ["ALREADY_EXISTS"] * 2
        assert len(host.images.finds) == 1

    def test_a_container_gets_one_lower_directory(self, host: Host) -> None:
        host.pulled()
        (mount,) = host.service.prepare("container", chain(2), {})
        tree = host.root / "snapshots" / str(host.service.stat(chain(2)).id) / "fs"
        assert mount.type == "overlay"
        assert f"lowerdir={tree}" in mount.options
        assert host.service.mounts("container") == [mount]

    def test_a_view_of_an_image_is_a_read_only_bind_of_its_mount(self, host: Host) -> None:
        host.pulled()
        (mount,) = host.service.view("view", chain(2), {})
        assert (mount.type, mount.options) == ("bind", ("ro", "rbind"))

    def test_a_part_of_an_image_is_mounted_when_it_is_used(self, host: Host) -> None:
        host.pulled()
        host.service.prepare("container", chain(1), {})
        assert [lazy.layers for lazy, _ in host.images.mounted][1:2] == [1]

    def test_layers_above_one_that_was_unpacked_stand_on_it(self, host: Host) -> None:
        host.images.find_fails = ImageInvalid("broken")
        assert host.service.prepare("extract-1", "", labels(1))[0].type == "bind"
        host.service.commit(chain(1), "extract-1", labels(1))
        host.images.find_fails = None
        assert refused(lambda: host.service.prepare("extract-2", chain(1), labels(2))) == "ALREADY_EXISTS"
        assert host.service.stat(chain(2)).parent == chain(1)

    def test_one_chain_on_two_parents_has_two_names(self, host: Host) -> None:
        host.pulled()
        host.service.prepare("extract-x", "", {})
        host.service.commit("unpacked", "extract-x", {})
        assert refused(lambda: host.service.prepare("extract-2", "unpacked", labels(2))) == "ALREADY_EXISTS"
        names = {one.name: one.parent for one in host.service.walk([f'labels."{SNAPSHOT_REF}"=={chain(2)}'])}
        assert sorted(names.values()) == sorted([chain(1), "unpacked"])


class TestUnpacked:
    @pytest.mark.parametrize(
        ("wrong", "said"),
        [
            ({"containerd.io/snapshot/cri.image-ref": ""}, "neither image nor layer"),
            ({"containerd.io/snapshot/cri.layer-digest": ""}, "cri.layer-digest is missing"),
            ({"containerd.io/snapshot/cri.layer-digest": "sha256:zz"}, "cannot be used"),
            ({"containerd.io/snapshot/cri.manifest-digest": "md5:00"}, "cannot be used"),
            ({"containerd.io/snapshot/cri.image-ref": "Not A Reference"}, "cannot be used"),
            ({SNAPSHOT_REF: "not a chain"}, "cannot be used"),
        ],
    )
    def test_labels_that_name_no_layer(self, host: Host, wrong: dict[str, str], said: str) -> None:
        assert host.service.prepare("extract-1", "", labels(1, **wrong))[0].type == "bind"
        assert said in host.images.reasons[0]
        assert host.images.finds == []

    def test_labels_of_tools_for_stargz_name_a_layer(self, host: Host) -> None:
        names = {
            SNAPSHOT_REF: chain(1),
            "containerd.io/snapshot/remote/stargz.reference": REF,
            "containerd.io/snapshot/remote/stargz.digest": labels(1)[
                "containerd.io/snapshot/cri.layer-digest"
            ],
        }
        assert refused(lambda: host.service.prepare("extract-1", "", names)) == "ALREADY_EXISTS"
        assert host.images.finds[0].reference == REF

    @pytest.mark.parametrize("error", [ImageInvalid("broken"), NodeUnavailable("no node")])
    def test_what_the_node_refuses_leaves_an_ordinary_snapshot_and_the_reason(
        self, host: Host, error: Exception
    ) -> None:
        host.images.find_fails = error  # type: ignore[assignment]
        host.service.prepare("extract-1", "", labels(1))
        assert host.images.reasons == [str(error)]
        assert len(host.service.walk([])) == 1
        assert len(host.files()) == 2

    def test_a_mount_that_fails_leaves_nothing_of_the_lazy_layer(self, host: Host) -> None:
        host.images.total = 1
        host.images.mount_fails = MountUnavailable("no fuse")
        host.service.prepare("extract-1", "", labels(1))
        assert [one.name for one in host.service.walk([])] == ["extract-1"]
        assert len(host.files()) == 2

    def test_unpacking_without_a_question_is_told_too(self, host: Host) -> None:
        host.service.prepare("default/7/extract-1 sha256:aa", "", {})
        assert len(host.images.reasons) == 1
        host.service.prepare("default/8/container", "", {})
        assert len(host.images.reasons) == 1


class TestRefused:
    def test_a_key_twice(self, host: Host) -> None:
        host.service.prepare("a", "", {})
        before = host.files()
        assert refused(lambda: host.service.prepare("a", "", {})) == "ALREADY_EXISTS"
        assert refused(lambda: host.service.view("a", "", {})) == "ALREADY_EXISTS"
        assert host.files() == before

    def test_unknown_parents_and_keys(self, host: Host) -> None:
        service = host.service
        calls = [
            lambda: service.prepare("a", "nobody", {}),
            lambda: service.prepare("a", "nobody", labels(1)),
            lambda: service.view("a", "nobody", {}),
            lambda: service.mounts("nobody"),
            lambda: service.commit("b", "nobody", {}),
            lambda: service.remove("nobody"),
            lambda: service.stat("nobody"),
            lambda: service.usage("nobody"),
            lambda: service.update("nobody", {}, []),
        ]
        assert [refused(call) for call in calls] == ["NOT_FOUND"] * len(calls)
        assert host.files() == []

    def test_what_is_not_committed_is_nobodys_parent(self, host: Host) -> None:
        host.service.prepare("a", "", {})
        assert refused(lambda: host.service.prepare("b", "a", {})) == "FAILED_PRECONDITION"

    def test_commits(self, host: Host) -> None:
        host.service.prepare("a", "", {})
        host.service.commit("A", "a", {})
        host.service.view("v", "A", {})
        host.service.prepare("b", "A", {})
        assert refused(lambda: host.service.commit("A", "b", {})) == "ALREADY_EXISTS"
        assert refused(lambda: host.service.commit("V", "v", {})) == "FAILED_PRECONDITION"
        assert refused(lambda: host.service.commit("B", "A", {})) == "FAILED_PRECONDITION"
        assert refused(lambda: host.service.commit("", "b", {})) == "INVALID_ARGUMENT"
        assert refused(lambda: host.service.commit("B", "b", {}, "other")) == "INVALID_ARGUMENT"
        assert refused(lambda: host.service.mounts("A")) == "FAILED_PRECONDITION"

    def test_removing_what_others_stand_on(self, host: Host) -> None:
        host.pulled()
        host.service.prepare("container", chain(2), {})
        assert refused(lambda: host.service.remove(chain(2))) == "FAILED_PRECONDITION"
        for key in ("container", chain(2), chain(1)):
            host.service.remove(key)
        assert host.files() == []

    def test_labels_too_long_for_containerd(self, host: Host) -> None:
        long = {"key": "v" * LABEL_MAX_BYTES}
        assert refused(lambda: host.service.prepare("a", "", long)) == "INVALID_ARGUMENT"
        host.service.prepare("a", "", {})
        assert refused(lambda: host.service.commit("A", "a", long)) == "INVALID_ARGUMENT"
        assert refused(lambda: host.service.update("a", long, [])) == "INVALID_ARGUMENT"
        assert refused(lambda: host.service.prepare("", "", {})) == "INVALID_ARGUMENT"

    def test_a_list_of_layers_that_was_cut_off_is_of_no_matter(self, host: Host) -> None:
        name = "containerd.io/snapshot/cri.image-layers"
        cut = {name: ("sha256:" + "a" * 64 + ",") * 60}
        cut[name] = cut[name][: LABEL_MAX_BYTES - len(name)]
        assert refused(lambda: host.service.prepare("extract-1", "", labels(1, **cut))) == "ALREADY_EXISTS"

    def test_only_labels_can_be_changed(self, host: Host) -> None:
        host.service.prepare("a", "", {"x": "1", "y": "2"})
        assert refused(lambda: host.service.update("a", {}, ["parent"])) == "INVALID_ARGUMENT"
        assert host.service.update("a", {"x": "3", "z": "4"}, ["labels.x", "labels.y"]).labels == {"x": "3"}
        assert host.service.update("a", {"z": "4"}, ["labels"]).labels == {"z": "4"}
        assert host.service.update("a", {}, []).labels == {}

    def test_a_mount_that_cannot_be_made_again_is_unavailable(self, host: Host) -> None:
        host.pulled()
        host.service.prepare("container", chain(2), {})
        before = host.files()
        host.images.mount_fails = MountUnavailable("no fuse")
        assert refused(lambda: host.service.mounts("container")) == "UNAVAILABLE"
        assert refused(lambda: host.service.prepare("another", chain(2), {})) == "UNAVAILABLE"
        assert host.files() == before

    @pytest.mark.parametrize(
        ("code", "status"),
        [(errno.ENOSPC, "RESOURCE_EXHAUSTED"), (errno.EROFS, "UNAVAILABLE"), (errno.EIO, "UNAVAILABLE")],
    )
    def test_a_disk_that_takes_no_record(
        self, host: Host, monkeypatch: pytest.MonkeyPatch, code: int, status: str
    ) -> None:
        host.service.prepare("a", "", {})
        before = host.files()

        def fail(*_: object) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(records, "write_durably", fail)
        assert refused(lambda: host.service.prepare("b", "", {})) == status
        assert refused(lambda: host.service.prepare("extract-1", "", labels(1))) == status
        assert refused(lambda: host.service.commit("A", "a", {})) == status
        assert host.files() == before
        assert host.service.stat("a").kind == "active"


class TestRestart:
    def test_everything_is_there_again(self, tmp_path: Path) -> None:
        first = Host(tmp_path / "root")
        with first.service.opened():
            first.pulled()
            made = first.service.prepare("container", chain(2), {"a": "b"})
            told = first.service.walk([])
        second = Host(tmp_path / "root")
        with second.service.opened():
            assert sorted(second.service.walk([]), key=lambda one: one.id) == sorted(
                told, key=lambda one: one.id
            )
            assert second.service.mounts("container") == made
            assert refused(lambda: second.service.remove(chain(2))) == "FAILED_PRECONDITION"
            second.service.prepare("another", chain(2), {})
            assert second.service.stat("another").id > max(one.id for one in told)

    def test_what_a_kill_left_is_removed_and_what_is_damaged_is_left_alone(self, tmp_path: Path) -> None:
        host = Host(tmp_path / "root")
        with host.service.opened():
            host.service.prepare("a", "", {})
            damaged = host.service.prepare("b", "", {})
        (host.root / "snapshots" / "77" / "fs").mkdir(parents=True)
        (host.root / "records" / "5.json.tmp").write_bytes(b"{")
        (host.root / "records" / "2.json").write_bytes(b"{")
        again = Host(host.root)
        with again.service.opened():
            assert [one.name for one in again.service.walk([])] == ["a"]
            assert again.files() == ["records/1.json", "records/2.json", "snapshots/1", "snapshots/2"]
            assert Path(damaged[0].source).is_dir()

    def test_cleanup_leaves_alone_what_is_being_made(self, host: Host) -> None:
        host.images.total = 1
        seen: list[list[str]] = []

        def clean(*_: object) -> None:
            host.service.cleanup()
            seen.append(host.files())

        host.images.mount = clean  # type: ignore[assignment,method-assign]
        assert refused(lambda: host.service.prepare("extract-1", "", labels(1))) == "ALREADY_EXISTS"
        assert seen == [["snapshots/1"]]

    def test_two_on_one_directory(self, host: Host) -> None:
        with pytest.raises(StateInUse), Host(host.root).service.opened():
            pass

    def test_a_directory_that_overlays_cannot_name(self, tmp_path: Path) -> None:
        with pytest.raises(StateError):
            Host(tmp_path / "a:b")


def test_usage_counts_what_was_written_and_hard_links_once(host: Host) -> None:
    (mount,) = host.service.prepare("a", "", {})
    folder = Path(mount.source)
    (folder / "file").write_bytes(b"x" * 100_000)
    os.link(folder / "file", folder / "again")
    usage = host.service.usage("a")
    assert usage.inodes == 2
    assert usage.bytes >= 100_000
    host.service.commit("A", "a", {})
    assert host.service.usage("A") == usage
