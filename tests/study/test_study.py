"""Studies: equal search and equal cost for all methods, records that survive, answers from them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from study_helpers import record_of, tiny, tiny_file

from benchmarks.study import work as working
from benchmarks.study.__main__ import main
from benchmarks.study.answers import answers
from benchmarks.study.problem import Problem, Task, read_problem
from benchmarks.study.records import Record, Records, read
from benchmarks.study.report import content, page_of, rows_of
from benchmarks.study.schedule import Schedule
from benchmarks.study.work import OutOfTime, Workplace, check_data, work
from raytrain.config.request import as_run
from raytrain.core.errors import RequestError, TrainingFailed
from raytrain.evaluation.confidence import difference

ROOT = Path(__file__).parents[2]


def all_done(problem: Problem, **robust: float) -> list[Record]:
    """Records of the whole of a study; `robust` by method, of its trials and test images."""
    found: list[Record] = []
    while (task := Schedule(problem, found).next(1e9, [])) is not None:
        share = robust.get(task.method, 0.5)
        source = np.random.RandomState(task.seed)
        flags = [] if task.phase == "tune" else (source.uniform(size=200) < share).tolist()
        found.append(record_of(Schedule(problem, found), task, share, flags))
    return found


# ---------------------------------------------------------------- the schedule


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_every_method_has_as_many_trials_at_the_same_cost_and_the_first_has_the_defaults(
    name: str,
) -> None:
    problem = read_problem(name)
    assert problem.tuning is not None
    trials = [t for t in Schedule(problem, []).tasks() if t.phase == "tune"]
    assert set(Counter(t.method for t in trials).values()) == {problem.tuning.trials}
    configs = {(t.method, t.trial): Schedule(problem, []).config(t) for t in trials}
    assert {run.fe_per_image for run in configs.values()} == {problem.tuning.fe_per_image}
    signatures = Counter(run.signature() for run in configs.values())
    assert set(signatures.values()) == {1}, "every trial is another configuration"
    for method in problem.methods:
        assert configs[method, 0] == problem.spaces[method].base_run
        for path, value in problem.methods[method].fixed.items():
            assert problem.hyperparameters(method, 1)[path] == value


@pytest.mark.parametrize("minutes", [3, 10])
def test_the_speed_record_is_the_run_file_on_three_seeds(minutes: int) -> None:
    problem = read_problem(f"speedrun_{minutes}min")
    file = as_run(ROOT / "benchmarks" / f"speedrun-{minutes}min.yaml")
    schedule = Schedule(problem, [])
    runs = [schedule.config(task) for task in schedule.tasks()]
    expected = [file.model_copy(update={"seed": seed}) for seed in range(3)]
    assert [run.signature() for run in runs] == [run.signature() for run in expected]
    assert problem.evaluations[-1].images is None and "aa" in problem.evaluations[-1].attacks


def test_runs_of_a_method_wait_for_its_trials_and_have_the_hyperparameters_of_the_best(
    tmp_path: Path,
) -> None:
    problem = tiny(tmp_path)
    found: list[Record] = []
    for trial, robust in ((0, 0.4), (1, 0.6)):
        assert Schedule(problem, found).chosen("pgd") is None
        task = Task("tiny", "tune", "pgd", trial, 10, 1000)
        found.append(record_of(Schedule(problem, found), task, robust))
    schedule = Schedule(problem, found)
    assert (schedule.chosen("pgd"), schedule.chosen("fgsm_rs")) == (1, None)
    runs = [task for task in schedule.tasks() if task.phase == "run"]
    assert {task.method for task in runs} == {"pgd"} and len(runs) == 2
    trained, tried = schedule.config(runs[0]), problem.trial("pgd", 1)
    assert (trained.algorithm, trained.optimizer) == (tried.algorithm, tried.optimizer)
    assert (trained.fe_per_image, [task.seed for task in runs]) == (20, [0, 1])


def test_a_trial_out_of_bounds_or_without_an_end_is_not_chosen_before_others(
    tmp_path: Path,
) -> None:
    problem = tiny(tmp_path, tuning={"trials": 3, "fe_per_image": 10})
    first = Schedule(problem, [])
    tasks = [Task("tiny", "tune", "fgsm_rs", trial, 10, 1000) for trial in range(3)]
    collapsed = record_of(first, tasks[0], 0.9, metrics={"sentinel/fgsm_gap": 0.8})
    diverged = record_of(first, tasks[1], None, state="training diverged")
    plain = record_of(first, tasks[2], 0.3)
    assert Schedule(problem, [collapsed, diverged, plain]).chosen("fgsm_rs") == 2
    collapsed_too = record_of(first, tasks[2], 0.3, metrics={"sentinel/fgsm_gap": 0.8})
    assert Schedule(problem, [collapsed, diverged, collapsed_too]).chosen("fgsm_rs") == 0
    failed = [record_of(first, task, None, state="training diverged") for task in tasks]
    assert Schedule(problem, failed).chosen("fgsm_rs") is None


def test_every_task_comes_once_and_those_that_fit_into_the_time_come_first(tmp_path: Path) -> None:
    problem = tiny(tmp_path)
    found = all_done(problem)
    assert len({one.task.key for one in found}) == len(found) == Schedule(problem, []).count
    left = [one for one in found if one.task.phase == "tune" or one.method != "pgd"]
    schedule = Schedule(problem, left)
    first = schedule.next(1e9, [])
    assert first is not None and (first.method, first.seed) == ("pgd", 0)
    assert schedule.seconds(first) == 3.0  # of the other method's runs
    assert schedule.next(2.9, []) == first, "it is paused, which loses nothing"
    second = schedule.next(1e9, [first])
    assert second is not None and (second.method, second.seed) == ("pgd", 1)


def test_records_of_another_configuration_are_not_those_of_a_task(tmp_path: Path) -> None:
    found = all_done(tiny(tmp_path))
    changed = tiny(tmp_path, base={**tiny(tmp_path).base, "batch_size": 30})
    assert Schedule(changed, found).records == []
    assert len(Schedule(tiny(tmp_path), found).records) == len(found)


# ---------------------------------------------------------------- records


def test_records_are_read_as_they_were_written_and_joined_without_a_loss(tmp_path: Path) -> None:
    found, records = all_done(tiny(tmp_path)), Records(tmp_path / "tiny")
    for record in found:
        records.add(record)
    key = lambda one: one.task.key  # noqa: E731
    assert sorted(records.read(), key=key) == sorted(found, key=key)
    file = records.join()
    assert [file] == list(records.folder.glob("*.parquet"))
    assert sorted(read(file), key=key) == sorted(found, key=key)


def test_only_what_is_missing_is_imported_and_only_of_this_problem(tmp_path: Path) -> None:
    found = all_done(tiny(tmp_path))
    here, there = Records(tmp_path / "here" / "tiny"), Records(tmp_path / "there" / "tiny")
    here.add(found[0])
    for record in found:
        there.add(record)
    assert here.take([there.folder]) == len(found) - 1
    assert here.take([there.join()]) == 0 and len(here.read()) == len(found)
    other = Records(tmp_path / "other")
    with pytest.raises(RequestError, match="expected records of other, found tiny"):
        other.take([there.folder])
    assert other.read() == []
    (tmp_path / "no.parquet").write_text("no")
    with pytest.raises(RequestError, match="expected records of a study"):
        here.take([tmp_path / "no.parquet"])


def test_records_of_an_earlier_configuration_do_not_hide_those_of_the_present_one(
    tmp_path: Path,
) -> None:
    """They are older, in the joined file, and stay there."""
    earlier = all_done(tiny(tmp_path))
    records = Records(tmp_path / "records" / "tiny")
    for record in earlier:
        records.add(record)
    records.join()
    changed = tiny(tmp_path, base={**tiny(tmp_path).base, "batch_size": 30})
    later = all_done(changed)
    assert records.take([_folder_of(later, tmp_path / "elsewhere")]) == len(later)
    assert Schedule(changed, records.read()).next(1e9, []) is None
    records.join()
    assert len(Schedule(changed, records.read()).records) == len(later)
    assert len(Schedule(tiny(tmp_path), records.read()).records) == len(earlier)


def _folder_of(found: list[Record], folder: Path) -> Path:
    for record in found:
        Records(folder).add(record)
    return folder


# ---------------------------------------------------------------- work


def test_a_task_that_is_paused_again_and_again_ends_as_one_that_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    word = str(tiny_file(tmp_path))
    task = Task("tiny", "run", "pgd", 0, 20, 0, 0)
    schedule = Schedule(read_problem(word), [])
    for trial in range(2):
        record = record_of(
            schedule, Task("tiny", "tune", "pgd", trial, 10, 1000), 0.5 - trial / 10
        )
        for name in "ab":
            Records(tmp_path / name).add(record)
    places = [Workplace(word, tmp_path / name, tmp_path / f"{name}-work") for name in "ab"]
    whole = work(task, places[0], 1e12)
    assert whole is not None and whole.finished and whole.result is not None

    monkeypatch.setattr(working, "_CHECKPOINTS", 1e-9)
    calls = pauses = 0

    def check(self: working.Clock, *_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 5 + 2 * pauses:  # within an epoch, and between parts of the evaluation
            raise OutOfTime

    monkeypatch.setattr(working.Clock, "check", check)
    paused = work(task, places[1], 1e12)
    while paused is None:
        pauses, calls = pauses + 1, 0
        assert pauses < 20
        paused = work(task, places[1], 1e12)
    assert pauses > 2
    same = ("flags", "predicted", "curves", "epochs", "fe_per_image", "valid_robust", "signature")
    assert {n: getattr(paused, n) for n in same} == {n: getattr(whole, n) for n in same}
    assert paused.result is not None
    assert paused.result["key"]["weights"] == whole.result["key"]["weights"]


def test_a_task_of_another_configuration_does_not_continue_the_training_of_this_one(
    tmp_path: Path,
) -> None:
    task = Task("tiny", "run", "pgd", 0, 20, 0, 0)
    word = str(tiny_file(tmp_path, tuning=None))
    assert work(task, Workplace(word, tmp_path / "a", tmp_path / "a-work"), 1e12) is not None
    word = str(tiny_file(tmp_path, tuning=None, base={**tiny(tmp_path).base, "batch_size": 30}))
    places = [Workplace(word, tmp_path / name, tmp_path / f"{name}-work") for name in "ab"]
    after, alone = [work(task, place, 1e12) for place in places]
    assert after is not None and alone is not None
    assert (after.curves["valid/robust"], after.flags) == (
        alone.curves["valid/robust"],
        alone.flags,
    )


def test_a_training_that_fails_is_recorded_with_the_reason(tmp_path: Path) -> None:
    base = {**tiny(tmp_path).base, "optimizer": {"lr": 1e6}}
    word = str(tiny_file(tmp_path, base=base))
    place = Workplace(word, tmp_path / "records", tmp_path / "work")
    record = work(Task("tiny", "tune", "pgd", 0, 10, 1000), place, 1e12)
    assert record is not None and "diverged" in record.state and record.valid_robust is None
    assert Records(place.records).read() == [record]


def test_what_a_machine_causes_is_not_recorded_as_the_method_s_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise TrainingFailed("no space left on device")

    monkeypatch.setattr(working, "evaluate", full)
    word = str(tiny_file(tmp_path))
    place = Workplace(word, tmp_path / "records", tmp_path / "work")
    for trial in range(2):
        tried = Task("tiny", "tune", "pgd", trial, 10, 1000)
        Records(place.records).add(record_of(Schedule(read_problem(word), []), tried))
    with pytest.raises(TrainingFailed, match="no space left"):
        work(Task("tiny", "run", "pgd", 0, 20, 0, 0), place, 1e12)
    assert {one.phase for one in Records(place.records).read()} == {"tune"}


def test_images_of_another_size_are_not_those_of_the_problem(tmp_path: Path) -> None:
    file = tmp_path / "train.parquet"
    pixels = np.random.RandomState(0).randint(0, 256, (40, 3 * 16 * 16), dtype=np.uint8)
    table = {"image": list(pixels), "label": [k % 10 for k in range(40)]}
    pq.write_table(pa.table(table), file)
    place = Workplace("cifar10", tmp_path, tmp_path, str(file))
    with pytest.raises(
        RequestError, match="--data: expected images of cifar10, size 32; found 16"
    ):
        check_data(read_problem("cifar10"), place)
    check_data(read_problem("digits"), Workplace("digits", tmp_path, tmp_path))


@pytest.mark.slow
def test_a_study_runs_without_the_frameworks_in_parts_and_its_report_is_made(
    tmp_path: Path,
) -> None:
    """Two processes, killed by the time once; what it says is what the records hold."""
    file, results = tiny_file(tmp_path), tmp_path / "results"
    unneeded = ("ray", "mlflow", "optuna", "matplotlib", "torchvision")
    bare = tmp_path / "bare"  # of all processes, also those that the study starts
    bare.mkdir()
    blocked = f"import sys; sys.modules.update(dict.fromkeys({unneeded}))"
    (bare / "sitecustomize.py").write_text(blocked)

    def study(*words: str, without: bool = True) -> subprocess.CompletedProcess[str]:
        paths = os.pathsep.join([*([str(bare)] if without else []), str(ROOT)])
        command = [sys.executable, "-m", "benchmarks.study", words[0], str(file)]
        return subprocess.run(
            [*command, "--results", str(results), *words[1:]],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
            timeout=300,
        )

    cut = ("run", "--minutes", "0", "--work", str(tmp_path / "work"))
    assert study(*cut).returncode == 0 and Records(results / "tiny").read() == []
    done = study("run", "--minutes", "5", "--work", str(tmp_path / "work"), "--processes", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "tiny: trials 4 of 4"
    records = Records(results / "tiny").read()
    assert len(records) == 8 and all(record.finished for record in records)
    shown = study("report", "--to", str(tmp_path / "report"), without=False)
    assert shown.returncode == 0, shown.stderr
    page = (results / "tiny" / "README.md").read_text()
    assert "8 of 8 records" in page and "Nothing: all tasks have records" in page
    assert (tmp_path / "report" / "report.html").is_file()


# ---------------------------------------------------------------- answers


def verdicts(problem: Problem, found: list[Record]) -> list[str]:
    shown = content(Schedule(problem, found))
    (comparable,) = [one for one in shown.comparables if one.images]
    given = answers(
        problem.questions, problem.budgets, comparable, rows_of(comparable), problem.seeds
    )
    return [answer.verdict for answer in given]


def test_an_answer_is_yes_no_or_not_decided_as_the_difference_is(tmp_path: Path) -> None:
    problem = tiny(tmp_path)
    assert verdicts(problem, all_done(problem, pgd=0.9, fgsm_rs=0.2)) == ["yes"]
    assert verdicts(problem, all_done(problem, pgd=0.2, fgsm_rs=0.9)) == ["no"]
    assert verdicts(problem, all_done(problem, pgd=0.5, fgsm_rs=0.5)) == ["not decided"]


def test_its_difference_is_that_of_the_flags_of_the_same_seeds(tmp_path: Path) -> None:
    problem = tiny(tmp_path)
    found = all_done(problem, pgd=0.8, fgsm_rs=0.5)
    shown = content(Schedule(problem, found))
    (comparable,) = [one for one in shown.comparables if one.images]
    ((answer,),) = [answers(problem.questions, [20], comparable, rows_of(comparable), 2)]
    (one,) = answer.comparisons
    flags = {(r.method, r.seed): np.array(r.flags["pgd20"]) for r in found if r.phase == "run"}
    pairs = [(flags["pgd", seed], flags["fgsm_rs", seed]) for seed in range(2)]
    assert one.difference == difference(pairs)


def test_nothing_is_decided_where_costs_differ_or_something_is_missing(tmp_path: Path) -> None:
    problem = tiny(tmp_path)
    found = all_done(problem, pgd=0.9, fgsm_rs=0.2)
    assert verdicts(problem, [r for r in found if r.phase == "tune" or r.method == "pgd"]) == [
        "not decided"
    ]
    schedule = Schedule(problem, found)
    one_seed = [r for r in found if (r.method, r.seed) != ("pgd", 1)]
    assert verdicts(problem, one_seed) == ["not decided"]
    page = page_of(Schedule(problem, one_seed), content(Schedule(problem, one_seed)), False)
    assert "1 of 2 seeds were measured for both" in page
    dear = [
        record_of(schedule, r.task, 0.9, r.flags["pgd20"], cost=30)  # pyright: ignore[reportArgumentType]
        if r.phase == "run" and r.method == "pgd"
        else r
        for r in found
    ]
    assert verdicts(problem, dear) == ["not decided"]
    page = page_of(Schedule(problem, dear), content(Schedule(problem, dear)), False)
    assert "the costs differ by more than a tenth" in page


def test_a_question_with_several_others_needs_all_of_them_for_a_yes(tmp_path: Path) -> None:
    methods = {name: {"space": name} for name in ("pgd", "fgsm_rs", "n_fgsm")}
    question = {"claim": "?", "source": "here", "method": "pgd", "against": ["fgsm_rs", "n_fgsm"]}
    problem = tiny(tmp_path, methods=methods, questions=[question])
    for n_fgsm, wanted in ((0.2, "yes"), (0.9, "not decided"), (1.0, "no")):
        found = all_done(problem, pgd=0.9, fgsm_rs=0.1, n_fgsm=n_fgsm)
        assert verdicts(problem, found) == [wanted]


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"questions": [{"claim": "?", "source": "", "method": "x", "against": ["pgd"]}]}, "found x"),
        ({"methods": {"pgd": {"space": "nothing"}}, "questions": []}, "found no nothing.yaml"),
        ({"tuning": {"trials": 1, "fe_per_image": 1, "seed": 1}}, "none of the 2 seeds"),
        ({"budgets": []}, "budgets"),
    ],
)  # fmt: skip
def test_a_wrong_problem_is_refused_in_a_sentence(
    tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(RequestError, match=said):
        _ = tiny(tmp_path, **changes).spaces


@pytest.mark.parametrize(
    "words, said",
    [
        (["run", "--minutes", "nan"], "--minutes: expected a number of at least 0, found nan"),
        (["run", "--minutes", "-1"], "--minutes: expected a number of at least 0, found -1"),
        (["run", "--minutes", "1", "--processes", "0"], "--processes: expected at least 1, found 0"),
        (["run", "--minutes", "1", "--threads", "-2"], "--threads: expected at least 1, found -2"),
        (["run", "--minutes", "1", "--results", "file"], "--results: expected a folder"),
        (["run", "--minutes", "1", "--work", "file"], "--work: expected a folder"),
        (["import", "--results", "file", "there"], "--results: expected a folder"),
        (["report", "--results", "file"], "--results: expected a folder"),
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused_in_a_sentence_before_any_work(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    command, *options = words
    argv = ["study", command, str(tiny_file(tmp_path)), *options]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(said) and error.count("\n") == 1
    assert {file.name for file in tmp_path.iterdir()} == {"file", "tiny.yaml"}


def test_a_problem_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="expected one of cifar10, .*digits.*found x"):
        read_problem("x")
