"""Which placement groups are removed from a cluster: none that anybody may still use."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from raytrain.distributed.leftovers import leftovers

ENDED, AT_WORK = b"\6\0\0\0", b"\7\0\0\0"
NOBODY, DEAD, ALIVE = b"\xff" * 16, b"dead", b"alive"


@pytest.mark.parametrize(
    ("job", "actor", "detached", "left"),
    [
        (ENDED, DEAD, False, True),
        (ENDED, NOBODY, False, True),  # made by the driver itself
        (ENDED, ALIVE, False, False),  # of an actor that outlives its job
        (ENDED, DEAD, True, False),
        (AT_WORK, DEAD, False, False),
        (AT_WORK, NOBODY, False, False),
    ],
)
def test_only_what_has_no_owner_any_more_is_removed(
    job: bytes, actor: bytes, detached: bool, left: bool
) -> None:
    group = SimpleNamespace(
        placement_group_id=b"id", creator_job_id=job, creator_actor_id=actor, is_detached=detached
    )
    found = leftovers([group], {ENDED.hex()}, lambda who: who == DEAD)
    assert found == ([b"id"] if left else [])
