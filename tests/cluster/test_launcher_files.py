"""Files of Ray's cluster launcher: they are what Ray takes, and what they start is closed to others."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER = Path(__file__).parents[2] / "cluster"
STARTS = ("head_start_ray_commands", "worker_start_ray_commands")


@pytest.fixture(params=["aws", "gcp", "on_premise"])
def launcher(request: pytest.FixtureRequest) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / f"{request.param}.yaml").read_text())


def test_ray_takes_them(launcher: dict[str, Any]) -> None:
    """Checked against the schema that Ray has, as `ray up` does before it calls a provider."""
    validate_config(prepare_config(launcher))
    with pytest.raises(ValidationError):
        validate_config({**prepare_config(launcher), "unknown": 1})


def test_ray_starts_with_its_token_and_a_dashboard_on_loopback(launcher: dict[str, Any]) -> None:
    head, worker = ("\n".join(launcher[key]) for key in STARTS)
    shells = "\n".join(launcher["setup_commands"])
    assert "--dashboard-host=127.0.0.1" in head
    assert "0.0.0.0" not in yaml.safe_dump(launcher)
    for start in (head, worker):
        assert "RAY_AUTH_MODE=token" in start + shells
    assert "chmod 600 ~/.ray/auth_token" in head + shells


def test_commands_are_parsed_by_a_shell(launcher: dict[str, Any]) -> None:
    for key in (*STARTS, "setup_commands", "head_setup_commands", "worker_setup_commands"):
        for command in launcher[key]:
            assert shlex.split(command)


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_what_is_copied_to_the_nodes_is_there_and_builds_the_package(name: str) -> None:
    launcher = yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())
    copied = {local for local in launcher["file_mounts"].values() if not local.startswith("~")}
    assert {"raytrain", "pyproject.toml", ".constraints.txt"} <= copied
    assert all((CLUSTER.parent / local).exists() for local in copied)
    assert all(f"~/raytrain/{local}" in launcher["file_mounts"] for local in copied)
    assert any("-c .constraints.txt" in command for command in launcher["setup_commands"])


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_only_workers_may_be_taken_away(name: str) -> None:
    launcher = yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())
    types = launcher["available_node_types"]
    spot = {kind for kind, of in types.items() if re.search("spot", str(of["node_config"]), re.I)}
    assert spot == types.keys() - {launcher["head_node_type"]}
    assert types[launcher["head_node_type"]]["resources"] == {"CPU": 0}
    assert all(
        of["max_workers"] <= launcher["max_workers"] for kind, of in types.items() if kind in spot
    )


def test_the_two_clouds_differ_in_their_nodes_only() -> None:
    aws, gcp = (yaml.safe_load((CLUSTER / f"{name}.yaml").read_text()) for name in ("aws", "gcp"))
    own = {"provider", "available_node_types", "head_setup_commands"}
    assert {key: aws[key] for key in aws.keys() - own} == {
        key: gcp[key] for key in gcp.keys() - own
    }
