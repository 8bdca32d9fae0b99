"""Placement groups that stay on a cluster after the job they belong to.

Ray removes those of a job when it ends, but not one that is registered a moment later, by a worker group
that was waiting for room. It holds resources that no job uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from raytrain.core.console import log_line


def remove_leftovers() -> None:
    """Remove what jobs that have ended have left on the cluster that this process is connected to.

    The interfaces of Ray are private: where they have changed, nothing is removed.
    """
    with suppress(Exception):
        if number := _remove_leftovers():
            log_line(
                f"raytrain: removed {number} placement groups of jobs that have ended from the cluster"
            )


def _remove_leftovers() -> int:
    import ray
    from ray._private.state import state
    from ray.core.generated import gcs_pb2
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    accessor: Any = state._connect_and_get_accessor()
    over = {job["JobID"] for job in state.job_table() if job["IsDead"]}
    table = gcs_pb2.PlacementGroupTableData  # pyright: ignore[reportAttributeAccessIssue]
    groups = [table.FromString(raw) for raw in accessor.get_placement_group_table()]

    def is_dead(actor: bytes) -> bool:
        raw = accessor.get_actor_info(ray.ActorID(actor))
        actors = gcs_pb2.ActorTableData  # pyright: ignore[reportAttributeAccessIssue]
        return raw is None or actors.FromString(raw).state == actors.DEAD

    found = leftovers([group for group in groups if group.state != table.REMOVED], over, is_dead)
    for group in found:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(group)))
    return len(found)


def leftovers(
    groups: Iterable[Any], over: set[str], is_dead: Callable[[bytes], bool]
) -> list[bytes]:
    """The ids of the placement groups that are to end with their jobs, and have not.

    `groups` are records of Ray's, `over` the jobs that have ended. A group also lives as long as the
    actor that has made it.
    """
    return [
        group.placement_group_id
        for group in groups
        if not group.is_detached
        and group.creator_job_id.hex() in over
        and (_is_nil(group.creator_actor_id) or is_dead(group.creator_actor_id))
    ]


def _is_nil(actor: bytes) -> bool:
    return set(actor) <= {255}
