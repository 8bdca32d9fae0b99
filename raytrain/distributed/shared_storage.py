"""Whether all machines of a cluster see the folder of checkpoints."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from raytrain.config.run import RunConfig
from raytrain.core.errors import RequestError
from raytrain.core.file_systems import is_url

_SECONDS = 60.0  # for all machines to answer; one that does not is passed over


def check_shared(run: RunConfig) -> None:
    """Check that a `storage` that is a folder is there on every machine of the cluster that was joined.

    A file is written to it for a moment, and looked for on one node of each machine.

    Raises:
        RequestError: naming `storage` and a machine without it.
    """
    others = _other_machines()
    if is_url(run.storage) or not others:
        return
    mark = run.root.resolve() / f".{uuid4().hex}"
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
        lacking = sorted(_lacking(mark, others))
    except OSError as error:
        raise RequestError(
            f"storage: {mark.parent} cannot be written ({error.strerror}); expected a folder that can be "
            "written"
        ) from None
    finally:
        with suppress(OSError):
            mark.unlink()
    if lacking:
        raise RequestError(
            f"storage: {mark.parent} of this machine is not there on {lacking[0]}, a node of the cluster, "
            "so that checkpoints would stay behind; expected a folder that all nodes share, or a URL such "
            "as s3://BUCKET/FOLDER"
        )


def _other_machines() -> dict[str, str]:
    """The id of one living node of each machine that is not this one, by host name."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    found = {node["NodeManagerHostname"]: node["NodeID"] for node in alive}
    found.pop(socket.gethostname(), None)
    return found


def _lacking(file: Path, machines: dict[str, str]) -> list[str]:
    """The machines on which a file is not there."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    is_there: Any = ray.remote(num_cpus=0, max_retries=0)(os.path.exists)
    asked = {
        is_there.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        ).remote(str(file)): name
        for name, node in machines.items()
    }
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_SECONDS)
    lacking = []
    for answer in answered:
        with suppress(RayError):  # the node has left the cluster
            if not ray.get(answer):
                lacking.append(asked[answer])
    return lacking
