"""The presence bitmap against a plain set, across processes, and its refusals."""

import os
import random
import subprocess
import sys

import pytest

from p2pgz.errors import StateError
from p2pgz.pool.presence import Presence, is_bitmap, iterate_bits


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 63, 64, 65, 1000])
def test_agrees_with_a_set(count):
    rng = random.Random(count)
    presence = Presence.create(count)
    model: set[int] = set()
    for _ in range(300 if count else 0):
        n = rng.randrange(count)
        if rng.random() < 0.7:
            presence.set(n)
            model.add(n)
        else:
            presence.clear(n)
            model.discard(n)
        first = rng.randrange(count)
        span = rng.randrange(count - first + 1)
        wanted = range(first, first + span)
        assert presence.has_range(first, span) == model.issuperset(wanted)
        assert presence.missing(first, span) == [k for k in wanted if k not in model]
        assert presence.has(n) == (n in model)
    assert presence.present_count() == len(model)
    assert list(iterate_bits(presence.to_bytes())) == sorted(model)
    again = Presence.create(count)
    again.load(presence.to_bytes())
    assert again.to_bytes() == presence.to_bytes()
    presence.close()
    presence.close()
    again.close()


def test_set_many_and_full_ranges():
    presence = Presence.create(40)
    presence.set_many(range(40))
    assert all(presence.has_range(a, b - a) for a in range(41) for b in range(a, 41))
    assert presence.to_bytes() == b"\xff" * 5
    presence.close()


def test_another_process_sees_the_bits_and_cannot_write():
    presence = Presence.create(20)
    presence.set(13)
    code = (
        "import sys\n"
        "from p2pgz.pool.presence import Presence\n"
        "p = Presence.attach(int(sys.argv[1]), 20)\n"
        "assert p.has(13) and not p.has(12)\n"
        "assert 'apsw' not in sys.modules and 'trio' not in sys.modules\n"
        "try: p.set(1)\n"
        "except PermissionError: sys.exit(7)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(presence.fd)], pass_fds=[presence.fd], check=False)
    assert done.returncode == 7
    assert not presence.has(1)
    presence.close()


def test_what_does_not_fit_is_refused():
    presence = Presence.create(12)
    with pytest.raises(StateError):
        presence.load(b"\x00")
    with pytest.raises(StateError):
        presence.load(b"\x00\xf0")
    for call in (presence.has, presence.set, presence.clear):
        with pytest.raises(IndexError):
            call(12)
        with pytest.raises(IndexError):
            call(-1)
    with pytest.raises(IndexError):
        presence.has_range(11, 2)
    with pytest.raises(StateError):
        Presence.attach(presence.fd, 17)
    with pytest.raises(OSError, match="not permitted"):
        os.ftruncate(presence.fd, 1)
    with pytest.raises(ValueError, match="bitmap"):
        Presence.create(-1)
    assert not is_bitmap(b"\x00\x10", 12)
    presence.close()
