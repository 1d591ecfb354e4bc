"""A hundred simulated nodes start the same image: everybody gets all of it, and the registry sends it about once."""

from __future__ import annotations

import json

import pytest

from p2pgz.testing.sim import Crowd, Result, Simulation, main

# few and large chunks: the decisions are made per extent
SMALL = {"mib": 8, "chunk_kib": 512}


def crowd(**settings: object) -> Result:
    result = Simulation(Crowd(**{**SMALL, **settings})).run()  # type: ignore[arg-type]  # names are checked by Crowd
    assert result.finished == result.alive, f"somebody did not get everything: {result}"
    return result


def test_without_faults_one_copy_leaves_the_registry() -> None:
    result = crowd(nodes=100, seed=1)
    assert result.copies == 1.0
    assert result.direct_chunks == 0
    assert result.busiest_ratio <= 3.5


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_homes_that_die_cost_little(seed: int) -> None:
    result = crowd(nodes=100, seed=seed, dead_share=0.05)
    assert result.alive < 100
    assert result.copies <= 1.2


def test_nodes_that_all_start_cold_beside_one_seed() -> None:
    assert crowd(nodes=60, seed=4, elders=1).copies == 1.0
    assert crowd(nodes=60, seed=4, elders=1, dead_share=0.2).copies <= 1.2


@pytest.mark.parametrize("seed", [11, 12])
def test_members_that_find_out_themselves_who_died(seed: int) -> None:
    result = crowd(nodes=100, seed=seed, membership=True, dead_share=0.05)
    assert result.alive < 100
    assert result.copies <= 1.2
    assert result.direct_chunks == 0


def test_members_that_come_and_go_while_others_start() -> None:
    result = crowd(
        nodes=60,
        seed=13,
        membership=True,
        elders=1,
        dead_share=0.1,
        start_within_seconds=15.0,
        dead_within_seconds=15.0,
    )
    assert result.alive < 60
    assert result.copies <= 1.2


def test_members_on_both_sides_of_a_partition() -> None:
    result = crowd(nodes=60, seed=14, membership=True, partition_seconds=15.0)
    assert result.copies <= 3.5  # each side fetches, some of it twice until it knows who is left


def test_a_slow_registry_is_not_a_dead_one() -> None:
    assert crowd(nodes=60, seed=5, registry_seconds=1.0).copies == 1.0


def test_both_sides_of_a_partition_get_everything() -> None:
    result = crowd(nodes=60, seed=6, partition_seconds=4.0)
    assert result.copies <= 2.0  # each side fetches what the other one cannot give it


def test_bytes_enter_a_zone_once() -> None:
    result = crowd(nodes=80, seed=7, zones=4)
    assert (result.copies, result.zone_copies) == (1.0, 3.0)


def test_nodes_without_credentials_get_it_from_others() -> None:
    result = crowd(nodes=60, seed=8, without_credentials_share=0.3)
    assert (result.copies, result.direct_chunks) == (1.0, 0)


def test_members_that_take_and_never_give_are_left() -> None:
    result = crowd(nodes=60, seed=15, never_serving_share=0.05)
    assert result.copies <= 4.0


def test_late_starters_do_not_all_ask_whoever_came_first() -> None:
    result = crowd(nodes=100, seed=16, start_within_seconds=15.0)
    assert result.copies == 1.0
    assert result.busiest_ratio <= 4.0


def test_slow_links_time_nobody_out() -> None:
    result = crowd(nodes=12, seed=9, up_mbit=20, down_mbit=20, registry_mbit=20)
    assert result.copies == 1.0


def test_the_command_ends_with_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--nodes", "5", "--mib", "2"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line.keys() >= {"copies", "p50_s", "p99_s", "busiest_ratio"}
    assert line["copies"] == 1.0


def test_the_same_seed_gives_the_same_run() -> None:
    one, other = (crowd(nodes=20, seed=10, dead_share=0.1) for _ in range(2))
    assert (one.events, one.p99_s) == (other.events, other.p99_s)
