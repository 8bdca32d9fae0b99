"""Where images are decoded on a cluster."""

from __future__ import annotations

import pytest

from raytrain.distributed.ray_data import _elsewhere

HEAD = {"NodeID": "ab", "Alive": True, "Resources": {"node:__internal_head__": 1.0}}
NODE = {"NodeID": "cd", "Alive": True, "Resources": {"CPU": 4.0}}
FULL = {**HEAD, "Resources": {**HEAD["Resources"], "CPU": 2.0}}


@pytest.mark.parametrize(
    ("nodes", "selector"),
    [
        ([HEAD, NODE], {"ray.io/node-id": "!ab"}),
        ([FULL, NODE], None),
        ([HEAD], None),
        ([{**HEAD, "Alive": False}, FULL], None),
    ],
)
def test_a_head_without_processors_decodes_nothing(nodes, selector) -> None:
    assert _elsewhere(nodes) == selector
