"""`cluster/slurm.sh` with stand-ins for `srun`, `ray`, `raytrain` and `scontrol`: no Slurm, no Ray."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "cluster" / "slurm.sh"

RAY = """
case "$1" in
get-auth-token) mkdir -p ~/.ray && echo secret > ~/.ray/auth_token ;;
symmetric-run)
  printf '%s\\n' "$@" > "$LOG/ray"
  env > "$LOG/env"
  [[ -e $LOG/no-start ]] && exit 0 # as Ray's own does where `ray start` fails
  while [[ $1 != -- ]]; do shift; done
  shift
  "$@"
  ;;
esac
"""
RAYTRAIN = """
printf '%s\\n' "$@" > "$LOG/raytrain.part"
mv "$LOG/raytrain.part" "$LOG/raytrain"
[[ -e $LOG/wait ]] || exit "$(cat "$LOG/status")"
trap 'exit 130' TERM
while :; do sleep 0.02; done
"""
SRUN = 'while [[ $1 == --* ]]; do shift; done\nexec "$@"\n'
SCONTROL = 'printf "%s\\n" "$*" > "$LOG/scontrol"\n'


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Path]:
    tools = tmp_path / "submitted" / ".venv" / "bin"
    tools.mkdir(parents=True)
    for name, text in {
        "srun": SRUN,
        "ray": RAY,
        "raytrain": RAYTRAIN,
        "scontrol": SCONTROL,
        "hostname": "echo 10.0.0.1 172.17.0.1\n",
    }.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (tools / name).chmod(0o755)
    folder = tmp_path / "log"
    folder.mkdir()
    (folder / "status").write_text("0")
    yield folder
    shutil.rmtree(f"/tmp/ray-{job(folder)}", ignore_errors=True)


def job(log: Path) -> str:
    return f"test-{os.getpid()}-{log.parent.name}"


def start(log: Path, *words: str) -> subprocess.Popen[str]:
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(log.parent),
        "LOG": str(log),
        "SLURM_SUBMIT_DIR": str(log.parent / "submitted"),
        "SLURM_JOB_ID": job(log),
        "SLURM_NNODES": "2",
        "SLURM_CPUS_ON_NODE": "8",
        "SLURM_GPUS_ON_NODE": "4",
    }
    return subprocess.Popen(
        ["bash", SCRIPT, *words], env=environment, text=True, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def test_raytrain_gets_the_arguments_as_they_are(log: Path) -> None:
    words = ["tune", "a space.yaml", "--name", "$HOME", "x='y'", "--", "run_name=a  b"]
    status, errors = finish(start(log, *words))
    assert (status, errors) == (0, "")
    assert (log / "raytrain").read_text().splitlines() == words


def test_ray_has_the_nodes_and_resources_of_the_job_and_a_private_token(log: Path) -> None:
    finish(start(log, "train"))
    words = (log / "ray").read_text().splitlines()
    assert words[:5] == ["symmetric-run", "--address", "10.0.0.1:6379", "--min-nodes", "2"]
    assert words[5:8] == ["--num-cpus=8", "--num-gpus=4", "--"]
    variables = dict(
        line.split("=", 1) for line in (log / "env").read_text().splitlines() if "=" in line
    )
    assert variables["RAY_ADDRESS"] == "10.0.0.1:6379"
    assert variables["RAY_AUTH_MODE"] == "token"
    assert int(variables["RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT"]) >= 300
    assert stat.S_IMODE((log.parent / ".ray" / "auth_token").stat().st_mode) == 0o600


@pytest.mark.parametrize("wanted", [1, 2, 130])
def test_its_status_is_that_of_raytrain(log: Path, wanted: int) -> None:
    (log / "status").write_text(str(wanted))
    assert finish(start(log, "train"))[0] == wanted
    assert not (log / "scontrol").exists()


def test_a_cluster_that_does_not_start_is_an_error(log: Path) -> None:
    (log / "no-start").touch()
    status, errors = finish(start(log, "train"))
    assert status == 1
    assert "Ray did not start" in errors


@pytest.mark.parametrize("continued", [True, False])
def test_at_the_end_of_its_time_it_stops_raytrain_and_is_queued_again(
    log: Path, continued: bool
) -> None:
    (log / "wait").touch()
    process = start(log, "tune", *(["--load-if-exists"] if continued else []))
    while not (log / "raytrain").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    assert finish(process)[0] == 130
    assert (log / "scontrol").exists() is continued
