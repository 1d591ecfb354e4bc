"""The mount's own tests, in erofs mode. Those that look at single requests of FUSE, or read with O_DIRECT, which EROFS
refuses where its devices are files, have their counterparts in the other files of this folder."""

from __future__ import annotations

import pytest

from tests.e2e.mount import image_on_disk
from tests.e2e.mount.test_reads import (  # noqa: F401
    image,
    test_concurrent_readers_of_random_places_get_the_right_bytes,
    test_deadline_ends_a_read_and_the_next_one_asks_anew,
    test_kernel_goes_back_to_large_reads_after_an_error,
    test_killed_reader_is_gone_at_once,
    test_refused_read_is_an_error_once_and_works_when_asked_again,
)
from tests.e2e.mount.test_tree import (  # noqa: F401
    test_absent_names_are_cached,
    test_directory_position_can_be_returned_to,
    test_every_kind_of_inode_looks_as_in_the_image,
    test_extended_attributes,
    test_large_directory_is_listed_completely_by_many,
    test_nothing_can_be_changed,
    test_permissions_bind_other_users,
    test_programs_run_from_the_mount,
    test_shared_map_locks_and_watches,
)

pytestmark = [pytest.mark.root, pytest.mark.trio]


@pytest.fixture(autouse=True)
def erofs(monkeypatch: pytest.MonkeyPatch) -> None:
    """`mounted` mounts that way."""
    monkeypatch.setattr(image_on_disk, "MODE", "erofs")
