"""Ray, started and stopped by the command, or joined at RAY_ADDRESS."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raytrain.core.console import log_line
from raytrain.core.errors import RequestError, TrainingFailed
from raytrain.core.signals import deferred, interrupted
from raytrain.distributed.leftovers import remove_leftovers

if TYPE_CHECKING:
    from raytrain.config.run import RunConfig

_DEFAULTS = {  # each may be overridden from outside
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",  # it takes SIGTERM from Python and dumps its stack
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # workers use this environment, not a rebuilt copy
    "RAY_AUTH_MODE": "token",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",  # to find room; then with the nodes that are left
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


_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
_TRIES = 3
_LONGEST_SOCKET = 107
_SOCKET = "session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store.1"


def wanted_cluster() -> str | None:
    """The address of a running cluster, if the user named one."""
    return os.environ.get("RAY_ADDRESS", "").strip() or None


@contextmanager
def session(run: RunConfig, trials: int = 1) -> Iterator[None]:
    """A Ray cluster for the time of a command: joined, or started here with room for `trials` at once.

    A local cluster counts workers, not cores: two workers on one core are slow, and allowed. Where this
    process has a cluster already, that one is used, and not stopped.

    Raises:
        RequestError: if RAY_ADDRESS leads nowhere, or no folder is short enough for Ray's sockets.
        TrainingFailed: if Ray does not start here.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    address = wanted_cluster()
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the trial manager reports failures
    try:
        with deferred(), _without_handler():
            _reread_settings()
            if address is not None:
                _join(address)
            else:
                _start(_local_cores(run, trials))
        _private_token()
        yield
    finally:
        ray.shutdown()


def _reread_settings() -> None:
    """Make Ray read `_DEFAULTS` again: it has kept what it found if it was imported before raytrain."""
    from ray._raylet import Config  # pyright: ignore[reportAttributeAccessIssue]

    Config.initialize("")


@contextmanager
def _without_handler() -> Iterator[None]:
    """Keep `ray.init` from handling SIGTERM: its handler raises SystemExit at any point inside Ray,
    even with a lock held.
    """
    from ray._private import utils

    before = utils.set_sigterm_handler
    utils.set_sigterm_handler = lambda _: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = before


def _join(address: str) -> None:
    import ray

    try:
        ray.init(address=address, **_QUIET)
    except Exception as error:
        # Ray raises many kinds here: a missing session, a refused connection, a wrong token.
        raise RequestError(
            f"RAY_ADDRESS: no Ray cluster answers at {address} ({_first_line(error)})"
        ) from None
    remove_leftovers()


def _start(cores: int) -> None:
    """Start Ray on this machine; on a busy one its own time limit of 30 s may take several tries."""
    import ray

    folder = socket_folder()
    for left in reversed(range(_TRIES)):
        before = _children()
        try:
            ray.init(
                address="local",
                num_cpus=cores,
                include_dashboard=False,
                _temp_dir=folder,
                **_QUIET,
            )
            return
        except Exception as error:  # Ray's own kinds, and bare Exception for its time limit
            ray.shutdown()
            for left_over in _children() - before:  # else they stay as long as this process
                with suppress(ProcessLookupError):
                    os.kill(left_over, signal.SIGKILL)
            if interrupted():
                raise
            if not left:
                raise TrainingFailed(
                    f"Ray did not start on this machine in {_TRIES} tries ({_first_line(error)}); "
                    "expected processor time, memory and disk to be free for it"
                ) from error
            log_line(f"raytrain: Ray did not start ({_first_line(error)}); trying again")


def _children() -> set[int]:
    """Processes that this one has started; none where the system does not list them."""
    files = Path("/proc/self/task").glob("*/children")
    return {int(number) for file in files for number in file.read_text().split()}


def socket_folder() -> str | None:
    """The folder for Ray's files: None for Ray's own choice, another where that path is too long.

    The path of a Unix socket has at most 107 bytes, and Ray's are `FOLDER/ray/session_.../sockets/...`.

    Raises:
        RequestError: if the usual short folders cannot be written.
    """
    wanted = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if len(os.fsencode(os.path.join(wanted, "ray", _SOCKET))) <= _LONGEST_SOCKET:
        return None
    for short in ("/tmp", "/var/tmp", "/dev/shm"):
        if os.access(short, os.W_OK | os.X_OK):
            return os.path.join(short, f"ray-{os.getuid()}")
    raise RequestError(
        f"TMPDIR: {wanted} is too long for Ray's sockets ({_LONGEST_SOCKET} bytes with what Ray adds) "
        "and /tmp cannot be written; expected a shorter folder in RAY_TMPDIR"
    )


def concurrent_trials(run: RunConfig, wanted: int | None) -> int:
    """How many trials of `run.workers` workers fit the cluster at once, at most `wanted`.

    Raises:
        RequestError: if not even one fits, or it needs a GPU and there is none.
    """
    import ray

    trials = _num_fitting(run, ray.cluster_resources())
    return trials if wanted is None else min(trials, wanted)


def room_for_trials(run: RunConfig) -> int:
    """How many trials of `run.workers` workers fit the cluster as it is now, also none."""
    import ray

    have = ray.cluster_resources()
    return _trials(run, _num_workers(_worker_resources(run, have), have))


def _num_workers(each: Mapping[str, float], have: Mapping[str, float]) -> int:
    """How many workers with the needs of `each` fit."""
    return int(min(have.get(name, 0) / need for name, need in each.items() if need) + 1e-9)


def _trials(run: RunConfig, fits: int) -> int:
    """How many trials so many workers are enough for."""
    return fits // run.workers or int(fits >= run.worker_range[0])


def _num_fitting(run: RunConfig, have: Mapping[str, float]) -> int:
    """How many trials fit the resources of a cluster; raises if none does."""
    each = _worker_resources(run, have)
    if run.performance.mode == "graph" and not each["GPU"]:
        raise RequestError(
            "performance.mode: graph needs a GPU and the cluster has none; expected auto, eager or compile"
        )
    fits = _num_workers(each, have)
    trials = _trials(run, fits)
    if trials == 0:
        field = "workers" if run.min_workers is None else "min_workers"
        needs = " and ".join(f"{need:g} {name}" for name, need in each.items() if need)
        raise RequestError(
            f"{field}: {run.worker_range[0]} workers of {needs} each were asked for and the cluster has "
            f"room for {fits}"
        )
    return trials


def check_fits(run: RunConfig) -> Literal["cpu", "cuda"]:
    """Check that the workers of a run fit the cluster that it would use; return their kind of device.

    A cluster that RAY_ADDRESS names is joined for it; a local one is not started.

    Raises:
        RequestError: as `session` and `concurrent_trials` do.
        TrainingFailed: as `session` does.
    """
    if wanted_cluster() is None:
        import torch

        socket_folder()
        have = {"CPU": float(_local_cores(run)), "GPU": float(torch.cuda.device_count())}
    else:
        import ray

        with session(run):
            have = ray.cluster_resources()
    _num_fitting(run, have)
    return "cuda" if _worker_resources(run, have)["GPU"] else "cpu"


def _local_cores(run: RunConfig, trials: int = 1) -> int:
    """The cores of a local cluster: at least as many as its workers need."""
    return max(os.cpu_count() or 1, run.workers * run.cpus_per_worker * trials)


def worker_resources(run: RunConfig) -> dict[str, float]:
    """CPUs and GPUs of one worker on this cluster."""
    import ray

    return _worker_resources(run, ray.cluster_resources())


def _worker_resources(run: RunConfig, have: Mapping[str, float]) -> dict[str, float]:
    gpus = run.gpus_per_worker if run.gpus_per_worker is not None else 1.0
    on_gpu = run.device == "cuda" or (run.device == "auto" and have.get("GPU", 0) > 0)
    return {"CPU": float(run.cpus_per_worker), "GPU": gpus if on_gpu else 0.0}


def _private_token() -> None:
    """Make Ray's token file readable by its owner alone; Ray uses the umask."""
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    if token.is_file() and token.stat().st_uid == os.getuid():
        token.chmod(0o600)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
