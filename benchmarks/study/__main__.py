"""A study, run in the minutes there are: methods at equal cost, on any machine, in as many parts as need be.

    python -m benchmarks.study run digits --minutes 20            # again, until nothing is left
    python -m benchmarks.study run cifar10 --minutes 12 --data cifar10/train.parquet
    python -m benchmarks.study import cifar10 FOLDER              # records of another machine
    python -m benchmarks.study status cifar10
    python -m benchmarks.study report cifar10 --to report

`run` needs neither Ray nor MLflow nor Optuna. Every task, a training with an evaluation, is recorded at
once in results/PROBLEM/; a training that the time cuts goes on where it was.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

from raytrain.core.console import log_line
from raytrain.core.errors import RequestError, TrainingFailed
from raytrain.core.files import check_folder

from .problem import HERE, Problem, Task, read_problem
from .records import Record, Records
from .schedule import Schedule
from .work import Workplace, check_data, set_up, work

RESULTS = HERE / "results"
_INTERRUPTED = 130
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run(options: argparse.Namespace) -> int:
    """Do tasks until the time is over or none is left; 130 after a signal."""
    _check(options)
    problem, records = opened(options)
    _ = problem.spaces  # refused before any work
    place = Workplace(
        options.problem, records.folder, options.work.resolve(), options.data, options.device
    )
    check_data(problem, place)
    deadline = time.time() + 60 * options.minutes
    context = get_context("spawn")
    stop = context.Event()
    received: list[int] = []
    for number in _SIGNALS:
        signal.signal(number, lambda which, frame: (received.append(which), stop.set()))
    running: dict[Future[Record | None], Task] = {}
    with ProcessPoolExecutor(
        options.processes, mp_context=context, initializer=set_up, initargs=(stop, options.threads)
    ) as pool:
        schedule = Schedule(problem, records.read())
        while True:
            while len(running) < options.processes and not stop.is_set():
                left = deadline - time.time()
                task = schedule.next(left, running.values()) if left > 0 else None
                if task is None:
                    break
                with _signals_blocked():  # in the processes that are started here
                    running[pool.submit(work, task, place, deadline)] = task
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task = running.pop(future)
                try:
                    record = future.result()
                except (RequestError, TrainingFailed):
                    stop.set()  # for the tasks beside it
                    raise
                schedule = Schedule(problem, records.read())
                _show(task, record, schedule)
    _show_status(schedule)
    return _INTERRUPTED if received else 0


def _check(options: argparse.Namespace) -> None:
    """Refuse numbers out of range, and folders that cannot be written."""
    if not 0 <= options.minutes < math.inf:
        raise RequestError(
            f"--minutes: expected a number of at least 0, found {options.minutes:g}"
        )
    for name in ("processes", "threads"):
        if (count := getattr(options, name)) < 1:
            raise RequestError(f"--{name}: expected at least 1, found {count}")
    for name in ("results", "work"):
        _check_folder(options, name)


def _check_folder(options: argparse.Namespace, name: str) -> None:
    folder = getattr(options, name).resolve()
    try:
        check_folder(folder)
    except OSError as error:
        raise RequestError(
            f"--{name}: expected a folder that can be written, found {folder} ({error.strerror})"
        ) from None


@contextmanager
def _signals_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def opened(options: argparse.Namespace) -> tuple[Problem, Records]:
    """The problem that was asked for, and its records."""
    problem = read_problem(options.problem)
    return problem, Records(options.results.resolve() / problem.name)


def _show(task: Task, record: Record | None, schedule: Schedule) -> None:
    """A line per task."""
    at = f"{len(schedule.records)}/{schedule.count}"
    what = f"{task.phase} {task.method}, {task.budget:g} FE"
    what += f", trial {task.trial}" if task.phase == "tune" else f", seed {task.seed}"
    if record is None:
        log_line(f"{at}  {what}: paused")
        return
    if not record.finished:
        log_line(f"{at}  {what}: {record.state}")
        return
    found = [] if record.valid_robust is None else [f"validation {record.valid_robust:.1%}"]
    if record.result is not None:
        shares = record.result["accuracies"]
        found += [f"{name} {share['value']:.1%}" for name, share in shares.items()]
    seconds = record.seconds + (record.evaluation_seconds or 0)
    log_line(f"{at}  {what}: {', '.join(found)}, {seconds:.0f} s")


def _show_status(schedule: Schedule) -> None:
    done = Counter((r.phase, r.evaluation) for r in schedule.records)
    problem = schedule.problem
    trials = len(problem.methods) * schedule.num_trials
    runs = len(problem.methods) * problem.seeds * len(problem.budgets)
    print(f"{problem.name}: trials {done['tune', None]} of {trials}")
    for number, settings in enumerate(problem.evaluations):
        images = "all" if settings.images is None else f"{settings.images:,}"
        print(f"  runs, {images} test images: {done['run', number]} of {runs}")
    failed = sum(not record.finished for record in schedule.records)
    if failed:
        print(f"  trainings that failed: {failed}")


def status(options: argparse.Namespace) -> int:
    """Print how many tasks are done."""
    problem, records = opened(options)
    _show_status(Schedule(problem, records.read()))
    return 0


def take(options: argparse.Namespace) -> int:
    """Add records of other machines."""
    _check_folder(options, "results")
    _, records = opened(options)
    print(f"{records.take(options.sources)} records added")
    return 0


def report(options: argparse.Namespace) -> int:
    """Join the records to one file, with a page and a figure beside it, and write the report."""
    from .report import write

    _check_folder(options, "results")
    problem, records = opened(options)
    schedule = Schedule(problem, records.read())
    if not schedule.records:
        raise RequestError(
            f"{options.problem}: expected records, found none; `run` makes them, `import` adds them"
        )
    for file in [*write(schedule, records.folder, options.to), records.join()]:
        print(os.path.relpath(file))
    return 0


def arguments() -> argparse.Namespace:
    """The command line."""
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=about)
    commands = parser.add_subparsers(required=True)
    for command in (run, status, take, report):
        name = "import" if command is take else command.__name__
        one = commands.add_parser(name, help=(command.__doc__ or "").splitlines()[0])
        one.set_defaults(command=command)
        one.add_argument("problem", help="digits, cifar10, or the path of a YAML file like theirs")
        one.add_argument("--results", type=Path, default=RESULTS, help="records of all problems")
        if command is run:
            one.add_argument("--minutes", type=float, required=True, help="after which it stops")
            one.add_argument("--processes", type=int, default=1, help="tasks at once")
            one.add_argument("--threads", type=int, default=1, help="of a task, on the processor")
            one.add_argument("--data", help="where the images of the problem are: a Parquet file")
            one.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
            one.add_argument("--work", type=Path, default=Path("runs/study"), help="checkpoints")
        if command is take:
            one.add_argument("sources", type=Path, nargs="+", help="Parquet files or folders")
        if command is report:
            one.add_argument("--to", type=Path, default=Path("comparisons/study"))
    return parser.parse_args()


def main() -> None:
    options = arguments()
    try:
        sys.exit(options.command(options))
    except RequestError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except TrainingFailed as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    except BrokenProcessPool:
        print("a process of the study has died, perhaps for want of memory", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)


if __name__ == "__main__":
    main()
