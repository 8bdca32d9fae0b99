"""Ray, started and stopped by the command, or joined where RAY_ADDRESS says."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raytrain.config import RunConfig
from raytrain.types import RequestError

_DEFAULTS = {  # each may be overridden from outside
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # workers use this environment, not a rebuilt copy
    "RAY_AUTH_MODE": "token",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours: Tune would return as if all were done
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",  # Tune's own snapshots: never read, longer with every trial
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


for _name, _value in _DEFAULTS.items():  # at import, since Ray reads them when it is imported
    os.environ.setdefault(_name, _value)


def wanted_cluster() -> str | None:
    """The address of a running cluster, if the user named one."""
    return os.environ.get("RAY_ADDRESS", "").strip() or None


@contextmanager
def session(run: RunConfig, trials: int = 1) -> Iterator[None]:
    """A Ray cluster for the time of a command: joined, or started here with room for `trials` at once.

    A local cluster counts workers, not cores: two workers on one core are slow, and allowed.

    Raises:
        RequestError: if RAY_ADDRESS leads nowhere.
    """
    import ray

    address = wanted_cluster()
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the ledger tells of failures
    if address is not None:
        try:
            ray.init(address=address, **quiet)
        except Exception as error:
            # Ray raises many kinds here: a missing session, a refused connection, a wrong token.
            raise RequestError(
                f"RAY_ADDRESS: no Ray cluster answers at {address} ({_first_line(error)})"
            ) from None
    else:
        cores = max(os.cpu_count() or 1, run.workers * run.cpus_per_worker * trials)
        ray.init(address="local", num_cpus=cores, include_dashboard=False, **quiet)
    _private_token()
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM (Slurm, Kubernetes) end the work the way Ctrl-C does: recorded, not abandoned."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        del number, frame
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def slots(run: RunConfig, wanted: int | None) -> int:
    """How many trials of `run.workers` workers fit the cluster at once, at most `wanted`.

    Raises:
        RequestError: if not even one fits.
    """
    import ray

    have = ray.cluster_resources()
    each = worker_resources(run)
    fits = int(min(have.get(name, 0) / need for name, need in each.items() if need) + 1e-9)
    trials = fits // run.workers
    if trials == 0:
        needs = " and ".join(f"{need:g} {name}" for name, need in each.items() if need)
        raise RequestError(
            f"workers: {run.workers} workers of {needs} each were asked for and the cluster has "
            f"room for {fits}"
        )
    return trials if wanted is None else min(trials, wanted)


def worker_resources(run: RunConfig) -> dict[str, float]:
    """CPUs and GPUs of one worker on this cluster."""
    import ray

    gpus = run.gpus_per_worker if run.gpus_per_worker is not None else 1.0
    on_gpu = run.device == "cuda" or (
        run.device == "auto" and ray.cluster_resources().get("GPU", 0) > 0
    )
    return {"CPU": float(run.cpus_per_worker), "GPU": gpus if on_gpu else 0.0}


def _private_token() -> None:
    """Make Ray's token file readable by its owner alone; Ray leaves that to the umask."""
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    if token.is_file() and token.stat().st_uid == os.getuid():
        token.chmod(0o600)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
