"""Stages and work items: exact results, whichever worker runs them and however often they stop."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers import ball_of, tiny_net, unchecked
from torch import Tensor, nn

from raytrain.attacks.autoattack import STAGES, Standard
from raytrain.core.distributed_context import DistributedContext
from raytrain.core.errors import RequestError, TrainingFailed
from raytrain.core.threat_models import L1, AbstractThreatModel
from raytrain.data.loader import SplitShard
from raytrain.evaluation.contract import Contract
from raytrain.evaluation.evaluator import Evaluator
from raytrain.evaluation.examples import examples_table
from raytrain.evaluation.record import RecordedContract
from raytrain.evaluation.result_log import ResultLog
from raytrain.evaluation.runner import StageProgress, StageResults, run
from raytrain.evaluation.settings import (
    CLEAN,
    NOISE,
    EvaluationSettings,
    stages_of,
    standard_stage,
)
from raytrain.evaluation.table import accuracies, findings_after, flags_table
from raytrain.evaluation.work_item import WorkItem, WorkResult


@pytest.fixture(autouse=True)
def shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoAttack with fewer steps and queries: what is asked here does not depend on how many."""
    of = Standard.of
    monkeypatch.setattr(
        Standard,
        "of",
        staticmethod(lambda norm, classes: replace(of(norm, classes), steps=20, queries=60)),
    )


def part_of(pixels: Tensor, labels: Tensor) -> SplitShard:
    return SplitShard(pixels, labels, len(labels), DistributedContext())


def evaluated(
    model: nn.Module,
    part: SplitShard,
    ball: AbstractThreatModel,
    settings: EvaluationSettings,
    folder: Path,
) -> StageResults:
    """All results of an settings, by one process."""
    with unchecked():
        evaluator = Evaluator(model, part, ball, settings)
        return run(
            settings,
            part.labels.numpy(),
            lambda work_items: map(evaluator.run, work_items),
            ResultLog(folder / "verdicts.jsonl", {}),
        )


# --- affine networks: the robust accuracy is known --------------------------------------------

ROOM = 0.3
"""Radius within which images whose pixels lie in [0.3, 0.7] do not meet the box, in any norm."""


class Linear(nn.Module):
    """W (x - 1/2): decision boundaries are planes."""

    def __init__(self, classes: int, seed: int, spread: float) -> None:
        super().__init__()
        rows = torch.randn(classes, 64, generator=torch.Generator().manual_seed(seed))
        self.rows = nn.Parameter(spread * rows)

    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.5).flatten(1) @ self.rows.T


def distances(model: Linear, images: Tensor, labels: Tensor, norm: str) -> Tensor:
    """How far each image is from the nearest other class: min over k of margin / dual norm."""
    rows = model.rows.detach().double()
    logits = (images.double() - 0.5).flatten(1) @ rows.T
    apart = rows[labels][:, None] - rows  # (n, classes, 64)
    dual = {"linf": 1, "l2": 2, "l1": torch.inf}[norm]
    away = (logits.gather(1, labels[:, None]) - logits) / apart.norm(dual, dim=2)
    return away.scatter(1, labels[:, None], torch.inf).amin(1)


@dataclass(frozen=True)
class Greys:
    """Images of pixels 77 to 178 with the classes that a network gives them, and a ball that half of
    them survive; for none does the last 3 % of the radius decide."""

    ball: AbstractThreatModel
    part: SplitShard
    survive: np.ndarray


def greys(model: Linear, norm: str, count: int) -> Greys:
    generator = torch.Generator().manual_seed(1)
    lean = torch.randint(-51, 52, (4 * count, 1, 8, 8), generator=generator).float()
    pixels = (127.5 + lean).round().to(torch.uint8)
    labels = model(pixels.float() / 255).argmax(1)
    away = distances(model, pixels.float() / 255, labels, norm)
    eps = float(away.median())
    assert eps < ROOM
    rows = ((away / eps - 1).abs() > 0.03).nonzero().flatten()[:count]
    ball = L1(eps=eps, spread=0) if norm == "l1" else ball_of(norm, eps)
    survive = (away[rows] > eps).numpy()
    assert 0.3 * count < survive.sum() < 0.7 * count == 0.7 * len(rows)
    return Greys(ball, part_of(pixels[rows], labels[rows]), survive)


@pytest.mark.parametrize("classes", [2, 3, 4, 10])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.slow
def test_autoattack_finds_exactly_what_an_affine_network_loses(
    norm: str, classes: int, tmp_path: Path
) -> None:
    model = Linear(classes, seed=classes, spread=3.0)
    case, settings = (
        greys(model, norm, 40),
        EvaluationSettings(attacks=("apgd", "aa"), checks=False),
    )
    results = evaluated(model, case.part, case.ball, settings, tmp_path)
    assert (results.survived(stages_of("aa")) == case.survive).all()
    apgd = results.survived(stages_of("apgd"))
    assert (apgd >= case.survive).all()
    if norm != "l1":  # there APGD moves several pixels where one is best
        assert (apgd == case.survive).all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_of_two_classes_every_attack_finds_exactly_what_an_affine_network_loses(
    norm: str, tmp_path: Path
) -> None:
    model = Linear(2, seed=0, spread=3.0)
    case = greys(model, norm, 100)
    settings = EvaluationSettings(attacks=("fgsm", "pgd", "cw"), steps=40, checks=False)
    results = evaluated(model, case.part, case.ball, settings, tmp_path)
    for name in settings.stages:
        assert (results.survived((name,)) == case.survive).all(), name


@pytest.mark.parametrize("classes", [3, 4, 10])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_with_restarts_pgd_and_cw_find_what_an_affine_network_loses(
    norm: str, classes: int, tmp_path: Path
) -> None:
    """Nearly, among ten classes: all starts of an image may climb towards the same wrong class."""
    model = Linear(classes, seed=classes, spread=3.0)
    case = greys(model, norm, 60)
    settings = EvaluationSettings(attacks=("pgd", "cw"), steps=20, restarts=5, checks=False)
    results = evaluated(model, case.part, case.ball, settings, tmp_path)
    for name in settings.stages:
        found = results.survived((name,))
        assert (found >= case.survive).all(), name
        missed = int((found & ~case.survive).sum())
        assert missed == 0 or (classes == 10 and missed <= 3), name


# --- stages -----------------------------------------------------------------------------------


def random_part(count: int, model: nn.Module) -> SplitShard:
    """Random images with the labels that the network gives to most of them."""
    generator = torch.Generator().manual_seed(4)
    pixels = torch.randint(256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = model.eval()(pixels.float() / 255).argmax(1)
    return part_of(pixels, labels.index_fill(0, torch.tensor([2, 5]), 0))


def test_the_words_of_an_exam_are_its_stages_in_order_from_weak_to_strong() -> None:
    settings = EvaluationSettings.model_validate({"attacks": "aa, pgd,fgsm,pgd", "restarts": 3})
    assert settings.names == ("fgsm", "pgd20x3", "aa")
    assert settings.stages == ("fgsm", "pgd20x3", *(f"aa.{stage}" for stage in STAGES))
    assert settings.every_stage == (CLEAN, *settings.stages, NOISE)
    assert settings.with_gradients == settings.stages[:-1]
    apgd = EvaluationSettings(attacks=("apgd",), checks=False)
    assert apgd.every_stage == (CLEAN, *stages_of("apgd"))
    assert [standard_stage(name) for name in ("aa.square", "square", "pgd20")] == [
        "square",
        None,
        None,
    ]


@pytest.mark.parametrize("wrong", [{"attacks": "pgd,bim"}, {"attacks": ()}, {"step": 3}])
def test_an_exam_of_unknown_words_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="attacks|step"):
        EvaluationSettings.model_validate(wrong)


def test_each_stage_is_about_what_those_before_it_have_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = Standard(steps=4, queries=20, targets=3, fab_targets=3)
    monkeypatch.setattr(Standard, "of", staticmethod(lambda norm, classes: few))
    model, count = tiny_net(torch.float32), 24
    part, settings = (
        random_part(count, model),
        EvaluationSettings(attacks=("fgsm", "pgd", "aa"), batch_size=7),
    )
    seen: dict[str, list[int]] = {}
    with unchecked():
        evaluator = Evaluator(model, part, ball_of("linf", 0.02), settings)

        def work(work_items: list[WorkItem]) -> Iterator[WorkResult]:
            for unit in work_items:
                assert 1 <= len(unit.rows) <= 7
                seen.setdefault(unit.stage, []).extend(unit.rows)
                yield evaluator.run(unit)

        results = run(settings, part.labels.numpy(), work, ResultLog(tmp_path / "j", {}))
    clean = results.clean.nonzero()[0].tolist()
    assert seen[CLEAN] == list(range(count)) and 0 < len(clean) < count
    assert seen["fgsm"] == seen["pgd20"] == seen["aa.apgd-ce"] == clean
    left = clean
    for stage in stages_of("aa"):
        assert seen.get(stage, []) == left
        left = [row for row in left if results.by_stage[stage][row] == 1]
    gradients = results.survived(settings.with_gradients)
    assert seen[NOISE] == gradients.nonzero()[0].tolist()
    table = flags_table(settings, results)
    assert table.column_names == [
        "index",
        "label",
        "predicted",
        CLEAN,
        *settings.names,
        *stages_of("aa"),
    ]
    columns = table.to_pydict()
    for row in range(count):
        values = [columns[stage][row] for stage in stages_of("aa")]
        assert columns["aa"][row] == all(value is True for value in values)
        fallen = values.index(False) if False in values else len(values)
        if columns[CLEAN][row]:
            assert values == ([True] * fallen + [False] + [None] * 3)[:4]
        else:
            assert values == [None] * 4 and not columns["pgd20"][row]
    shares = accuracies(settings, results)
    assert list(shares) == [CLEAN, *settings.names]
    assert all(shares[name].count == sum(columns[name]) for name in shares)


def test_an_attack_without_gradients_that_wins_is_a_finding() -> None:
    settings, labels = EvaluationSettings(attacks=("aa",)), np.zeros(10, dtype=np.int64)
    by_stage = {stage: np.ones(10, dtype=np.int64) for stage in (*settings.stages, NOISE)}
    (finding,) = findings_after(settings, StageResults(labels, labels, by_stage))
    assert finding.passed
    by_stage["aa.square"][:3] = 0
    (finding,) = findings_after(settings, StageResults(labels, labels, by_stage))
    assert (finding.check, finding.passed, finding.value) == ("black_box", False, 0.3)
    unchecked_settings = settings.model_copy(update={"checks": False})
    assert findings_after(unchecked_settings, StageResults(labels, labels, by_stage)) == []


# --- resuming ---------------------------------------------------------------------------------


class Interrupted(Exception):
    """Whatever ends a process."""


Outcome = tuple[pa.Table, int]
"""The flags of an evaluation, and what it cost."""


@pytest.mark.parametrize("where", ["work", "watch"])
def test_an_evaluation_that_is_interrupted_after_any_unit_goes_on_where_it_was(
    where: str, tmp_path: Path
) -> None:
    model, settings = (
        tiny_net(torch.float32),
        EvaluationSettings(attacks=("pgd", "apgd"), steps=3, batch_size=12),
    )
    part = random_part(30, model)
    labels = part.labels.numpy()
    with unchecked():
        evaluator = Evaluator(model, part, ball_of("linf", 0.02), settings)
    known: dict[
        WorkItem, WorkResult
    ] = {}  # a unit's result is the same at every attempt: see below

    def attempt(file: Path, stop_after: int | None) -> tuple[Outcome, list[WorkItem]]:
        done: list[WorkItem] = []
        log = ResultLog(file, {"seed": 0})

        def work(work_items: Iterable[WorkItem]) -> Iterator[WorkResult]:
            for unit in work_items:
                if where == "work" and len(done) == stop_after:
                    raise Interrupted
                done.append(unit)
                if unit not in known:
                    known[unit] = evaluator.run(unit)
                yield known[unit]

        def watch(now: StageProgress) -> None:
            del now
            if where == "watch" and len(done) == stop_after:
                raise Interrupted

        results = run(settings, labels, work, log, watch)
        return (flags_table(settings, results), log.fe), done

    whole, work_items = attempt(tmp_path / "whole", None)
    assert len(work_items) == len(set(work_items)) > 8
    for stop_after in range(1, len(work_items)):
        file = tmp_path / f"{stop_after}"
        with pytest.raises(Interrupted):
            attempt(file, stop_after)
        assert len(file.read_text().splitlines()) == 1 + stop_after
        again, rest = attempt(file, None)
        assert again == whole
        assert rest == work_items[stop_after:]
    again, rest = attempt(tmp_path / "whole", None)
    assert rest == [] and again == whole


def result_of(number: int) -> WorkResult:
    return WorkResult(WorkItem("pgd20", (2 * number, 2 * number + 1)), (1, 0), 84, 0.5)


def test_a_torn_line_is_forgotten_and_the_rest_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "verdicts.jsonl"
    log = ResultLog(file, {"seed": 0})
    for number in range(3):
        log.add(result_of(number))
    whole = file.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for size in range(last, len(whole)):
        file.write_bytes(whole[:size])
        again = ResultLog(file, {"seed": 0})
        assert len(again) == 2
        assert again.get(result_of(1).work_item) == result_of(1)
        assert again.get(result_of(2).work_item) is None
        again.add(result_of(2))
        assert file.read_bytes() == whole


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[]",
        '{"stage": "pgd20"}',
        '{"stage": "pgd20", "rows": [0, 1], "values": [1], "fe": 1, "seconds": 1}',
        "\xff\xfe",
    ],
)
def test_a_line_that_is_no_result_ends_the_log(line: str, tmp_path: Path) -> None:
    file = tmp_path / "verdicts.jsonl"
    ResultLog(file, {}).add(result_of(0))
    with file.open("a", encoding="latin-1") as text:
        text.write(line + "\n")
    assert len(ResultLog(file, {})) == 1
    assert len(file.read_text().splitlines()) == 2


def test_a_result_log_of_another_key_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "verdicts.jsonl"
    ResultLog(file, {"seed": 0, "weights": "a"}).add(result_of(0))
    assert len(ResultLog(file, {"weights": "a", "seed": 0})) == 1
    assert len(ResultLog(file, {"seed": 1, "weights": "a"})) == 0
    assert len(ResultLog(file, {"seed": 0, "weights": "a"})) == 0  # it was begun anew


def test_a_result_log_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingFailed, match=r"verdicts.jsonl: could not be written"):
        ResultLog(tmp_path / "file" / "verdicts.jsonl", {})


def test_the_order_in_which_results_come_changes_nothing(tmp_path: Path) -> None:
    model, settings = (
        tiny_net(torch.float32),
        EvaluationSettings(attacks=("pgd", "apgd"), steps=3, batch_size=9),
    )
    part = random_part(20, model)
    evaluator = Evaluator(model, part, ball_of("linf", 0.02), settings)

    def outcome(step: int) -> Outcome:
        log = ResultLog(tmp_path / str(step), {})

        def work(work_items: list[WorkItem]) -> Iterable[WorkResult]:
            return map(evaluator.run, work_items[::step])

        return flags_table(settings, run(settings, part.labels.numpy(), work, log)), log.fe

    assert outcome(1) == outcome(-1)
    fresh = Evaluator(copy.deepcopy(model), part, ball_of("linf", 0.02), settings)
    for stage in settings.every_stage[::-1]:
        unit = WorkItem(stage, (3, 4, 6, 7))
        one, other = fresh.run(unit), evaluator.run(unit)
        assert (one.values, one.fe) == (other.values, other.fe)


def test_watchers_see_every_unit_once_and_what_is_left(tmp_path: Path) -> None:
    settings, labels = (
        EvaluationSettings(attacks=("fgsm",), checks=False, batch_size=4),
        np.array([0, 1] * 5),
    )
    seen: list[StageProgress] = []

    def work(work_items: list[WorkItem]) -> Iterator[WorkResult]:
        for unit in work_items:
            yield WorkResult(unit, (0,) * len(unit.rows), 1, 0.0)

    run(settings, labels, work, ResultLog(tmp_path / "j", {}), seen.append)
    assert [(s.stage, s.done, s.work_items, s.images, s.left, s.evaluated) for s in seen] == [
        (CLEAN, 1, 3, 10, 2, 4),
        (CLEAN, 2, 3, 10, 4, 8),
        (CLEAN, 3, 3, 10, 5, 10),
        ("fgsm", 1, 2, 5, 0, 4),
        ("fgsm", 2, 2, 5, 0, 5),
    ]


# --- contract ---------------------------------------------------------------------------------


def test_the_hash_changes_exactly_with_what_the_contract_says() -> None:
    base = Contract.of(ball_of("linf", 8 / 255), (0.5,), (0.25,))
    rounded = json.loads(json.dumps(0.0313725490))
    assert Contract.of(ball_of("linf", rounded), (0.5,), (0.25,)).hash == base.hash
    spread = [L1(eps=12, spread=share) for share in (0.05, 0.2)]
    assert len({Contract.of(ball, (0.5,), (0.25,)).hash for ball in spread}) == 1
    others = [
        Contract.of(ball_of("linf", 4 / 255), (0.5,), (0.25,)),
        Contract.of(ball_of("l2", 8 / 255), (0.5,), (0.25,)),
        Contract.of(ball_of("linf", 8 / 255), (0.5001,), (0.25,)),
        Contract.of(ball_of("linf", 8 / 255), (0.5,), (0.2501,)),
        Contract.of(ball_of("linf", 8 / 255), (0.5, 0.5), (0.25, 0.25)),
        replace(base, input_range=(0.0, 255.0)),
        replace(base, bn="train"),
    ]
    assert len({base.hash, *(other.hash for other in others)}) == 1 + len(others)
    assert len(base.hash) == 8 and int(base.hash, 16) >= 0
    assert "linf eps 0.0313725" in base.text and RecordedContract.of(base).hash == base.hash


# --- examples ---------------------------------------------------------------------------------


def test_examples_are_rightly_classified_images_of_different_classes(tmp_path: Path) -> None:
    model, ball, settings = (
        tiny_net(torch.float32),
        ball_of("linf", 0.05),
        EvaluationSettings(attacks=("fgsm",)),
    )
    part = random_part(40, model)
    results = evaluated(model, part, ball, settings, tmp_path)
    table = examples_table(Evaluator(model, part, ball, settings).attacked, results, ball)
    rows = table.to_pydict()
    assert len(table) == 10 and rows["index"] == sorted(set(rows["index"]))
    assert rows["label"] == rows["predicted"]
    assert set(rows["label"]) == set(results.labels[results.clean].tolist())
    assert all(0 < distance <= 0.05 + 1e-6 for distance in rows["distance"])
    assert all(picture.startswith(b"\x89PNG") for picture in rows["perturbation"])


def test_there_may_be_no_example(tmp_path: Path) -> None:
    model, ball = tiny_net(torch.float32), ball_of("linf", 0.05)
    settings, part = (
        EvaluationSettings(attacks=("fgsm",), checks=False),
        random_part(6, tiny_net(torch.float32)),
    )
    wrong = part_of(part.whole, (model(part.whole.float() / 255).argmax(1) + 1) % 4)
    results = evaluated(model, wrong, ball, settings, tmp_path)
    assert not results.clean.any()
    table = examples_table(Evaluator(model, wrong, ball, settings).attacked, results, ball)
    assert len(table) == 0 and {"image", "adversarial"} <= set(table.column_names)
    assert accuracies(settings, results)["fgsm"].value == 0


def test_no_image_has_no_accuracy() -> None:
    nothing = np.zeros(0, dtype=np.int64)
    with pytest.raises(RequestError, match="images"):
        accuracies(EvaluationSettings(checks=False), StageResults(nothing, nothing, {}))
