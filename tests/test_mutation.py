from __future__ import annotations

import random
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from models.loop import GateRule
from models.orders import Effected
from models.policy import AgentPolicy, policy_digest
from scripts.chaos.bound import World
from scripts.chaos.mutations import MUTATIONS, other_policy, run

CASES = 300


async def test_nothing_that_was_changed_in_one_place_happens_and_every_twin_happens_once(
    tmp_path: Path,
) -> None:
    tally = await run(tmp_path, CASES, seed=20261124)
    assert tally.executed == []
    assert tally.failed == []
    assert tally.effects == CASES
    assert set(tally.mutations) == set(MUTATIONS)


async def test_an_untouched_case_is_refused_once_its_approver_is_gone_and_done_when_back(
    tmp_path: Path,
) -> None:
    world = World(tmp_path, seed=1)
    try:
        bound = await world.bind("one")
        gone = await MUTATIONS["person"](world, bound)
        assert await world.act(gone) == Effected.REFUSED
        assert world.effects() == 0
        assert await world.act(bound) == Effected.APPLIED
        assert world.effects() == 1
    finally:
        world.database.close()


@given(st.integers(min_value=0, max_value=2**32))
@settings(max_examples=50, deadline=None)
def test_every_policy_that_a_mutation_makes_differs_from_the_one_that_was_bound(seed: int) -> None:
    policy = AgentPolicy(connectors=("null",), gate=GateRule(assurance="signed", roles=("editor",)))
    assert policy_digest(other_policy(policy, random.Random(seed))) != policy_digest(policy)
