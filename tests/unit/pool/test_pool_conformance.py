"""The real pool and the fake keep the same contract."""

import pytest

from p2pgz.pool.memory import MemoryPool
from p2pgz.pool.pool import Pool
from p2pgz.testing.conformance_pool import POOL_CASES


@pytest.mark.trio
@pytest.mark.parametrize("case", POOL_CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("kind", ["memory", "disk"])
async def test_contract(kind, case, tmp_path):
    if kind == "memory":
        async with MemoryPool.open() as pool:
            await case(pool)
    else:
        async with Pool.open(tmp_path / "state", boot_id="boot") as pool:
            await case(pool)
