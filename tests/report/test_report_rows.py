"""What is compared with what, ranked by what, and how sure: on runs that are made up."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_helpers import IMAGES, contract_of, evaluated, finding, flags_of, trained
from scipy.stats import binomtest

from raytrain.evaluation.confidence import difference, holm, mcnemar, over_seeds, wilson
from raytrain.evaluation.names import attack_title, strongest_first
from raytrain.plotting.sheet import save
from raytrain.report import curve_figures
from raytrain.report.answer import answer_of
from raytrain.report.comparable import ComparableRuns, comparable_runs
from raytrain.report.configurations import settings_of
from raytrain.report.cost_figures import cost_figure, gap_figure
from raytrain.report.evaluations import EvaluatedRun
from raytrain.report.image_figures import by_class
from raytrain.report.importance import equal_cost_of, importance_of
from raytrain.report.inline_svg import inline
from raytrain.report.page import without_password
from raytrain.report.pairs import pairs_of
from raytrain.report.rows import VALID, Row
from raytrain.report.runs import Trained
from raytrain.report.sections import Section, columns_of, section_of, seeds_of
from raytrain.report.styles import looks_of

SHARES = st.integers(0, 1000).map(lambda k: k / 1000)


def compared(*runs: Trained) -> list[ComparableRuns]:
    return comparable_runs(settings_of(runs))


def alone(*runs: Trained) -> ComparableRuns:
    (comparable,) = compared(*runs)
    return comparable


def shown_rows(part: Section) -> list[dict[str, Any]]:
    """The rows of a table that are not folded away."""
    return [row for band in part.bands for row in band.rows]


def random_flags(share: float, seed: int, count: int = 200) -> Any:
    rng = np.random.default_rng(seed)
    clean = rng.random(count) < 0.9
    return flags_of({"clean": clean, "pgd20": clean & (rng.random(count) < share)})


# --- seeds and configurations -------------------------------------------------------------------


def test_seeds_of_a_configuration_are_one_row_with_mean_spread_and_count() -> None:
    values = (0.41, 0.47, 0.59)
    runs = [trained(seed=k, robust=[0.1, value]) for k, value in enumerate(values)]
    (row,) = alone(*runs).rows
    cell, spread = row.valid(), over_seeds(values)
    assert cell is not None and len(row.setting.runs) == 3
    assert (cell.value, cell.std, cell.low, cell.high) == (
        spread.mean,
        spread.std,
        spread.low,
        spread.high,
    )


def test_a_single_seed_has_the_interval_of_its_images() -> None:
    (row,) = alone(trained(evaluations=[evaluated(shares={"pgd20": (53, 100)})])).rows
    cell, share = row.score("pgd20"), wilson(53, 100)
    assert cell is not None and cell.std is None
    assert (cell.value, cell.low, cell.high) == (0.53, share.low, share.high)
    assert cell.text == f"53.0 [{100 * share.low:.1f}, {100 * share.high:.1f}]"


def test_a_repeated_seed_is_not_averaged() -> None:
    first = trained(seed=1, robust=[0.9])
    again = trained(seed=1, robust=[0.5], id="again", began=9)
    (setting,) = settings_of([trained(seed=0, robust=[0.3]), first, again])
    assert [run.id for run in setting.repeats] == [first.id]
    (row,) = comparable_runs([setting])[0].rows
    cell = row.valid()
    assert cell is not None and cell.value == 0.4 and cell.seeds == 2


def test_of_two_runs_of_a_seed_the_evaluated_one_is_taken() -> None:
    told = trained(evaluations=[evaluated(shares={"pgd20": (5, 10)})])
    later = trained(id="later", began=9)
    (setting,) = settings_of([told, later])
    assert [run.id for run in setting.runs] == [told.id]


def test_a_label_tells_what_differs_and_nothing_else() -> None:
    runs = [
        trained("pgd", params={"algorithm.steps": 5, "optimizer.lr": 0.1, "outer.name": "awp"}),
        trained("pgd", params={"algorithm.steps": 10, "optimizer.lr": 0.1, "outer.name": "sgd"}),
        trained("natural", params={"optimizer.lr": 0.1, "outer.name": "sgd"}),
    ]
    labels = {setting.label for setting in settings_of(runs)}
    assert labels == {"pgd + awp steps=5", "pgd steps=10", "natural"}


def test_words_that_would_mislead_are_spelled_out() -> None:
    runs = [
        trained(params={"algorithm.steps": steps, "evaluation.steps": judged})
        for steps, judged in ((5, 10), (7, 20))
    ]
    labels = {setting.label for setting in settings_of(runs)}
    assert labels == {"pgd steps=5 evaluation.steps=10", "pgd steps=7 evaluation.steps=20"}


# --- cost ---------------------------------------------------------------------------------------


def test_the_training_images_are_those_of_the_data_set_or_else_of_an_epoch() -> None:
    assert trained().images == IMAGES
    # 104 images in batches of 10: an epoch visits 100 of them.
    assert trained(split_size=104).images == 104
    assert trained(curves={}).images is None


def test_costs_within_a_tenth_are_one_band_and_are_ranked_within_it() -> None:
    costs = {"a": 100.0, "b": 109.0, "c": 112.0, "d": 500.0}
    values = {"a": 0.4, "b": 0.5, "c": 0.1, "d": 0.2}
    comparable = alone(*[trained(n, cost=costs[n], robust=[values[n]]) for n in costs])
    assert [(row.label, row.band, row.rank) for row in comparable.rows] == [
        ("b", 0, 1),
        ("a", 0, 2),
        ("c", 1, 1),
        ("d", 2, 1),
    ]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), SHARES), min_size=1, max_size=8))
def test_the_front_is_what_nothing_equally_cheap_or_cheaper_equals(
    points: list[tuple[int, float]],
) -> None:
    runs = [
        trained(f"m{k}", cost=2.0**cost, robust=[value])  # each cost is a band
        for k, (cost, value) in enumerate(points)
    ]
    comparable = alone(*runs)
    front = {(round(math.log2(row.cost or 1)), cell.value) for row in comparable.rows if row.front
             for cell in [row.valid()] if cell}  # fmt: skip
    beaten = {p for p in points if any(o[0] <= p[0] and o[1] >= p[1] and o != p for o in points)}
    assert front == set(points) - beaten
    assert sum(row.front for row in comparable.rows) == len(front)


def test_of_equally_dear_ones_only_the_best_is_on_the_front() -> None:
    comparable = alone(
        trained("a", cost=229.0, robust=[0.4]),
        trained("b", cost=230.0, robust=[0.6]),
        trained("c", cost=400.0, robust=[0.7]),
    )
    assert [row.label for row in comparable.rows if row.front] == ["b", "c"]


# --- what may be compared -----------------------------------------------------------------------


def test_other_threat_models_data_and_test_sets_are_apart() -> None:
    ten = evaluated(shares={"pgd20": (5, 10)})
    twenty = evaluated(shares={"pgd20": (5, 20)})
    runs = [
        trained("a", evaluations=[ten]),
        trained("b", evaluations=[ten]),
        trained("c", evaluations=[ten], tags={"contract": "c2"}),
        trained("d", evaluations=[ten], params={"data.name": "mnist"}),
        trained("e", evaluations=[twenty]),
    ]
    together = [{row.label[0] for row in comparable.rows} for comparable in compared(*runs)]
    assert sorted(map(sorted, together)) == [["a", "b"], ["c"], ["d"], ["e"]]


def test_networks_with_other_normalisers_are_compared_under_the_same_threat_model() -> None:
    """The normaliser is a part of the network: pixels of [0, 1] are attacked before it."""
    threat = "linf eps 0.1 in [0, 1], {}, BatchNorm eval"
    said = {
        "a": threat.format("normaliser inside (mean 0.3, std 0.4)"),
        "b": threat.format("no normaliser"),
        "c": threat.replace("0.1", "0.2").format("no normaliser"),
    }
    runs = []
    for name, text in said.items():
        one = evaluated(shares={"pgd20": (5, 10)}, contract=contract_of(f"of {name}", text))
        tags = {"contract": f"of {name}", "contract_text": text}
        runs.append(trained(name, evaluations=[one], tags=tags))
    comparables = compared(*runs)
    together = [{row.label[0]: row.home for row in comparable.rows} for comparable in comparables]
    assert together == [{"a": True, "b": True}, {"c": True}]
    assert [one.threat for one in comparables] == [
        threat.format("X").replace("X, ", ""),
        said["c"],
    ]


def test_an_imported_network_has_no_cost_and_is_named_by_its_run() -> None:
    one = evaluated(shares={"pgd20": (9, 10)})
    tags, params = {"kind": "imported"}, {"evaluation.steps": 50}
    theirs = replace(
        trained("x", robust=[], evaluations=[one], tags=tags, params=params), name="robustbench-X"
    )
    comparable = alone(trained("a", evaluations=[one]), theirs)
    row = next(row for row in comparable.rows if row.setting.first.imported)
    assert (row.label, row.cost, row.front) == ("robustbench-X", None, False)
    assert [note for note in comparable.notes if "not trained here" in note]
    assert not [note for note in comparable.notes if "Validation" in note]


def test_equally_many_but_other_images_are_another_test_set() -> None:
    one = evaluated(flags_of({"clean": [True] * 10, "pgd20": [True] * 10}))
    other = evaluated(flags_of({"clean": [True] * 10, "pgd20": [True] * 10}, first=50))
    comparables = compared(trained("a", evaluations=[one]), trained("b", evaluations=[other]))
    assert [len(comparable.rows) for comparable in comparables] == [1, 1]


def test_validation_is_ranked_only_where_it_was_done_alike() -> None:
    runs = [trained("a"), trained("b"), trained("c", params={"evaluation.steps": 50})]
    together = [sorted(row.label[0] for row in comparable.rows) for comparable in compared(*runs)]
    assert sorted(together) == [["a", "b"], ["c"]]


def test_what_was_not_evaluated_stands_unranked_beside_what_was_and_says_how() -> None:
    comparable = alone(
        trained("a", evaluations=[evaluated(shares={"pgd20": (5, 10)})]),
        trained("b", robust=[0.9], id="0" * 32),
    )
    assert [
        (row.label, row.rank, row.ranking_cell(comparable.attack) is None)
        for row in comparable.rows
    ] == [
        ("a", 1, False),
        ("b", None, True),
    ]
    part = section_of(comparable, [], [])
    assert answer_of(comparable, []).command == f"raytrain evaluate {'0' * 8} attacks=pgd"
    cells = next(row["cells"] for row in shown_rows(part) if row["label"] == "b")
    assert part.heads[0] == "PGD-20, %" and cells[0]["value"] == "-"


def test_a_foreign_contract_is_an_arena_of_its_own_and_marked_everywhere() -> None:
    foreign = evaluated(
        shares={"clean": (9, 10), "pgd20": (1, 10)},
        scope="test_linf-0.2",
        contract=contract_of("c2", "linf eps 0.2"),
        same_contract=False,
    )
    home = evaluated(shares={"clean": (9, 10), "pgd20": (5, 10)})
    native = evaluated(
        shares={"clean": (8, 10), "pgd20": (4, 10)}, contract=contract_of(text="linf eps 0.2")
    )
    comparables = compared(
        trained("a", evaluations=[home, foreign]),
        trained("b", evaluations=[native], tags={"contract": "c2"}),
    )
    here = {
        comparable.title: {row.label[0]: row for row in comparable.rows}
        for comparable in comparables
    }
    assert here.keys() == {
        "digits, linf eps 0.1, 10 test images",
        "digits, linf eps 0.2, 10 test images",
    }
    away = here["digits, linf eps 0.2, 10 test images"]
    assert (away["a"].marks, away["b"].marks) == ("†", "")
    assert away["a"].valid() is None  # of another threat model
    comparable = next(comparable for comparable in comparables if len(comparable.rows) == 2)
    shown = next(
        row for row in shown_rows(section_of(comparable, [], [])) if row["label"].startswith("a")
    )
    assert all("†" in cell["marks"] for cell in shown["cells"] if cell.get("interval"))
    assert comparable.leader is not None and comparable.leader.label[0] == "b"


def test_a_failed_check_is_marked_and_neither_leads_nor_ranks_nor_is_on_the_front() -> None:
    masked = evaluated(shares={"pgd20": (9, 10)}, findings=(finding(False, "zero_gradients"),))
    honest = evaluated(shares={"pgd20": (5, 10)})
    comparable = alone(
        trained("masked", cost=1.0, evaluations=[masked]),
        trained("honest", cost=99.0, evaluations=[honest]),
    )
    rows = {row.label: row for row in comparable.rows}
    assert (rows["masked"].marks, rows["masked"].rank, rows["masked"].front) == ("⚠", None, False)
    assert comparable.leader is rows["honest"] and rows["honest"].front
    part = section_of(comparable, pairs_of(comparable), [])
    assert part.failed == [f"{rows['masked'].letter}: zero_gradients: why"]
    shown = next(row for row in shown_rows(part) if row["label"] == "masked")
    assert [c["marks"] for c in shown["cells"] if c.get("interval")] == ["⚠"]


def test_the_tag_of_a_run_is_believed_where_the_files_are_missing() -> None:
    comparable = alone(
        trained(
            evaluations=[evaluated(shares={"pgd20": (9, 10)})],
            tags={"checks": "FAILED: randomised"},
        )
    )
    assert comparable.rows[0].failed == ("randomised",) and comparable.leader is None
    answer = answer_of(comparable, [])
    assert answer.text.endswith("nothing here can be ranked.") and not answer.decided


def test_findings_of_this_threat_model_are_believed_before_the_tag_of_any() -> None:
    checked = evaluated(shares={"pgd20": (9, 10)}, findings=(finding(True),))
    comparable = alone(trained(evaluations=[checked], tags={"checks": "FAILED: randomised"}))
    assert comparable.rows[0].trusted and comparable.leader is comparable.rows[0]


def test_rows_are_ranked_by_the_strongest_attack_that_all_have() -> None:
    both = evaluated(shares={"pgd20": (5, 10), "aa": (4, 10)})
    one = evaluated(shares={"pgd20": (6, 10)})
    assert alone(trained("a", evaluations=[both])).attack == "aa"
    assert alone(*[trained(n, evaluations=[both]) for n in "ab"]).attack == "aa"
    mixed = alone(trained("a", evaluations=[both]), trained("b", evaluations=[one]))
    assert mixed.attack == "pgd20" and columns_of(mixed) == ["clean", "pgd20", "aa"]
    assert alone(trained("a")).attack == VALID


def test_attacks_by_strength_and_by_name() -> None:
    names = ["fgsm", "pgd20", "cw20", "aa", "pgd20x5-eps_8", "apgd", "pgd50"]
    by_strength = ["aa", "apgd", "pgd20x5-eps_8", "pgd50", "pgd20", "cw20", "fgsm"]
    assert strongest_first(names) == by_strength
    assert [attack_title(n) for n in ("aa", "pgd20", "pgd20x5", "cw20-eps_8", "mine")] == [
        "AutoAttack",
        "PGD-20",
        "PGD-20, 5 restarts",
        "CW-20, step eps/8",
        "mine",
    ]


def test_the_last_checkpoint_is_not_taken_for_the_best() -> None:
    last = evaluated(shares={"pgd20": (3, 10)}, scope="test_last", checkpoint="last")
    best = evaluated(shares={"pgd20": (5, 10)})
    (row,) = alone(trained(evaluations=[best, last])).rows
    where, before, after = row.gap("pgd20")
    assert before is not None and after is not None
    assert (where, before.value, after.value) == ("test", 0.5, 0.3)
    (row,) = alone(trained(evaluations=[last])).rows
    assert row.score("pgd20") is None


def test_the_best_epoch_is_the_first_of_the_highest() -> None:
    run = trained(robust=[0.1, 0.5, 0.4, 0.5, 0.2])
    (row,) = alone(run).rows
    where, best, last = row.gap(VALID)
    assert run.best_epoch == 2 and best is not None and last is not None
    assert (where, best.value, last.value) == ("validation", 0.5, 0.2)


# --- pairs --------------------------------------------------------------------------------------


def test_pairs_are_mcnemars_on_the_same_images_adjusted_by_holm() -> None:
    flags = {name: random_flags(share, k) for k, (name, share) in enumerate(
        {"a": 0.95, "b": 0.7, "c": 0.3}.items())}  # fmt: skip
    turned = flags["b"].sort_by([("index", "descending")])
    comparable = alone(*[
        trained(n, evaluations=[evaluated(turned if n == "b" else flags[n])]) for n in flags
    ])  # fmt: skip
    pairs = pairs_of(comparable)
    told = {name: flags[name]["pgd20"].to_numpy(False) for name in flags}
    wanted = {}
    for name in "bc":
        only_a, only_other = (
            int((told["a"] & ~told[name]).sum()),
            int((~told["a"] & told[name]).sum()),
        )
        wanted[name] = (only_a, only_other, binomtest(only_a, only_a + only_other).pvalue)
    assert {p.other.label: (p.only_leader, p.only_other, p.p) for p in pairs} == wanted
    assert [pair.holm for pair in pairs] == holm([pair.p for pair in pairs])
    assert all(pair.low <= pair.difference <= pair.high for pair in pairs)


def test_seeds_are_paired_and_p_is_twice_the_median() -> None:
    first = {seed: random_flags(0.8, seed) for seed in range(3)}
    second = {seed: random_flags(0.6, 10 + seed) for seed in range(3)}
    comparable = alone(
        *[trained("a", k, evaluations=[evaluated(first[k])]) for k in first],
        *[trained("b", k, evaluations=[evaluated(second[k])]) for k in second],
    )
    (pair,) = pairs_of(comparable)
    p_values, differences = [], []
    for k in range(3):
        one, two = (t[k]["pgd20"].to_numpy(False) for t in (first, second))
        only = int((one & ~two).sum())
        p_values.append(binomtest(only, int((one != two).sum())).pvalue)
        differences.append(one.mean() - two.mean())
    assert pair.p == min(1.0, 2 * float(np.median(p_values))) and pair.seeds == 3
    assert pair.difference == pytest.approx(np.mean(differences), abs=1e-12)
    assert pair.ahead == sum(d > 0 for d in differences)
    rows = [tuple(t[k]["pgd20"].to_numpy(False) for t in (first, second)) for k in range(3)]
    whole = difference([(one, two) for one, two in rows])
    assert (pair.low, pair.high) == (whole.low, whole.high)


def test_what_failed_a_check_or_has_no_flags_is_in_no_pair() -> None:
    flags = evaluated(random_flags(0.8, 0))
    worse = random_flags(0.5, 1)
    bare = evaluated(
        shares={n: (s.count, s.images) for n, s in evaluated(worse).accuracies.items()}
    )
    comparables = compared(
        trained("a", evaluations=[flags]),
        trained(
            "masked", evaluations=[evaluated(worse, findings=(finding(False, "randomised"),))]
        ),
        trained("bare", evaluations=[bare]),
    )
    assert [pairs_of(comparable) for comparable in comparables] == [[] for _ in comparables]


def test_equals_cannot_be_told_apart() -> None:
    same = evaluated(random_flags(0.5, 0))
    comparable = alone(trained("a", evaluations=[same]), trained("b", evaluations=[same]))
    (pair,) = pairs_of(comparable)
    assert (pair.p, pair.holm, pair.difference, pair.relation) == (1.0, 1.0, 0.0, "not told apart")
    answer = answer_of(comparable, [pair])
    assert "Not decided" in answer.text and not answer.decided
    assert answer.text.endswith("; B (b of seed 0) cannot be told from it on the same images.")


# --- figures ------------------------------------------------------------------------------------


def test_classes_are_the_means_of_their_images_over_seeds() -> None:
    one = flags_of({"clean": [True] * 20, "aa": [True] * 10 + [False] * 10})
    two = flags_of({"clean": [True] * 20, "aa": [False] * 20})
    runs = [trained(seed=k, evaluations=[evaluated(f)]) for k, f in enumerate((one, two))]
    (row,) = alone(*runs).rows
    assert by_class(row, "aa") == {k: 0.25 for k in range(10)}
    assert by_class(row, "clean") == {k: 1.0 for k in range(10)}


def test_a_mean_curve_is_exact_where_the_curves_are_straight() -> None:
    slow, fast = np.array([[1.0, 2], [3.0, 6]]), np.array([[2.0, 10], [4.0, 20]])
    assert curve_figures.over_seeds([slow, fast]).tolist() == [[3.0, 10.5, 6.0, 15.0]]
    assert curve_figures.over_seeds([slow]).tolist() == [[1, 2, 2, 2], [3, 6, 6, 6]]


def test_every_letter_is_one_configuration_and_colours_are_given_once() -> None:
    comparable = alone(*[trained(f"m{k}", cost=1.0 + k, robust=[k / 40]) for k in range(40)])
    letters = [row.letter for row in comparable.rows]
    assert len(set(letters)) == 40 and {"A", "Z", "AA", "AN"} <= set(letters)
    named = [look for look in looks_of(comparable).values() if look.named]
    assert len(named) == len({look.colour for look in named}) == len({x.marker for x in named})


def test_a_figure_on_a_page_has_ids_of_its_own_and_the_pages_colours(tmp_path: Path) -> None:
    comparable = alone(trained("a"), trained("b", cost=10.0))
    figures = [cost_figure(comparable), gap_figure(comparable)]
    ids: list[str] = []
    for number, figure in enumerate(figures):
        assert figure is not None
        _, vectors = save(figure, tmp_path / f"{number}")
        svg = inline(vectors, f"f{number}", 'a "b" <c>')
        found = re.findall(r'\bid="([^"]+)"', svg)
        used = re.findall(r'(?:url\(#|href="#)([^)"]+)', svg)
        assert svg.startswith("<svg") and set(used) <= set(found) and used
        assert "#000000" not in svg and "currentColor" in svg
        assert 'aria-label="a &quot;b&quot; &lt;c>"' in svg
        ids += found
    assert len(ids) == len(set(ids))


def test_the_parameter_that_decides_is_the_first() -> None:
    rng = np.random.default_rng(0)
    runs = []
    for k in range(40):
        lr, steps = float(10 ** rng.uniform(-3, 0)), int(rng.integers(1, 11))
        value = 0.8 - 0.2 * (math.log10(lr) + 1.2) ** 2
        params = {"optimizer.lr": lr, "algorithm.steps": steps}
        runs.append(trained(params=params, robust=[max(0.0, value)], began=k))
    first, second = importance_of(alone(*runs))
    assert (first.key, second.key) == ("optimizer.lr", "algorithm.steps")
    assert first.value > 0.6 and first.trials == 40


def test_few_or_equal_configurations_say_nothing_of_importance() -> None:
    assert importance_of(alone(trained("a"), trained("b"))) == []
    equal = [trained(params={"optimizer.lr": 0.1 * k}, robust=[0.5]) for k in range(1, 9)]
    assert importance_of(alone(*equal)) == []


def test_stopped_trials_do_not_count_for_importance() -> None:
    runs = [
        trained(params={"optimizer.lr": 0.1 * k}, robust=[k / 20], tags={"outcome": "stopped"})
        for k in range(1, 12)
    ]
    assert importance_of(alone(*runs)) == []


def test_of_many_rows_the_evaluated_ones_and_the_best_of_every_band_are_shown_at_once() -> None:
    told = [evaluated(shares={"pgd20": (5, 10)})]
    runs = [
        trained(f"m{k}", cost=[10.0, 99.0][k % 2], robust=[k / 100], evaluations=told * (k == 1))
        for k in range(100)
    ]
    part = section_of(alone(*runs), [], [])
    shown = {row["label"] for row in shown_rows(part)}
    assert sum(len(band.rows) + len(band.folded) for band in part.bands) == 100
    assert len(shown) <= 25
    assert {"m1", "m99", "m98"} <= shown and not {"m0", "m3"} & shown
    titles = [band.title for band in part.bands]
    assert titles == ["99 FE per training image", "10 FE per training image"]


def test_columns_in_which_nobody_has_a_number_are_left_out() -> None:
    part = section_of(alone(trained("a")), [], [])
    assert not {"seconds", "validation, clean"} & set(part.heads)
    assert all(len(row["cells"]) == len(part.heads) for row in shown_rows(part))


# --- small things -------------------------------------------------------------------------------


def test_the_state_of_a_run_in_words() -> None:
    words = {"complete": "finished", "stopped": "stopped early", "diverged": "diverged"}
    assert {w: trained(tags={"outcome": w}).state for w in words} == words
    assert trained(status="RUNNING").state == "running, or its driver died"
    assert trained(tags={"stopped_by": "fgsm_gap"}).state == "stopped by a sentinel"


def test_a_password_is_not_shown() -> None:
    assert without_password("https://me:secret@host:5000/x") == "https://host:5000/x"
    assert without_password("sqlite:////tmp/mlflow.db") == "sqlite:////tmp/mlflow.db"


def test_a_run_without_anything_is_a_row() -> None:
    bare = trained(robust=[], params={}, metrics={}, curves={})
    comparable = alone(bare)
    (row,) = comparable.rows
    assert isinstance(row, Row) and row.cost is None and comparable.leader is None
    assert section_of(comparable, [], []).bands[0].title == "cost not recorded"
    assert cost_figure(comparable) is None and gap_figure(comparable) is None


# --- what must not be mixed ----------------------------------------------------------------------


def rights(count: int, of: int = 1000, **changes: Any) -> EvaluatedRun:
    """An evaluation in which the first `count` images hold."""
    table = flags_of({"clean": [True] * of, "pgd20": [k < count for k in range(of)]})
    return evaluated(table, **changes)


def test_arenas_of_one_description_have_titles_of_their_own() -> None:
    one, two = (rights(50, 100, key={"images": digest}) for digest in ("aaaa", "bbbb"))
    comparables = comparable_runs(
        settings_of([trained("a", evaluations=[one]), trained("b", evaluations=[two])])
    )
    titles = [comparable.title for comparable in comparables]
    assert len(set(titles)) == 2 and "aaaa" in " ".join(titles) and "bbbb" in " ".join(titles)


def test_the_same_labels_are_another_test_set_if_the_images_are_others() -> None:
    one, two = (rights(50, 100, key={"images": digest}) for digest in ("clear", "foggy"))
    assert one.test_set != two.test_set
    assert rights(50, 100).test_set == rights(60, 100).test_set != ""


def test_seeds_that_contradict_one_another_do_not_tell_two_apart() -> None:
    runs = [
        trained(name, seed, evaluations=[rights(count)])
        for name, counts in (("a", (900, 300, 900, 300)), ("b", (500,) * 4))
        for seed, count in enumerate(counts)
    ]
    comparable = alone(*runs)
    (pair,) = pairs_of(comparable)
    assert (pair.ahead, pair.seeds, pair.relation) == (2, 4, "not told apart")
    assert not answer_of(comparable, [pair]).decided


def test_a_leader_that_is_behind_on_what_both_have_is_not_called_ahead() -> None:
    leading = [trained("a", k, evaluations=[rights(c)]) for k, c in enumerate((500, 800, 800))]
    comparable = alone(*leading, trained("b", 0, evaluations=[rights(600)]))
    (pair,) = pairs_of(comparable)
    assert (pair.relation, round(pair.difference, 3)) == ("behind", -0.1)
    answer = answer_of(comparable, [pair])
    assert "behind B" in answer.text and "ahead" not in answer.text and not answer.decided


def test_one_pair_has_mcnemars_two_sided_p() -> None:
    comparable = alone(
        trained("a", evaluations=[rights(520)]), trained("b", evaluations=[rights(510)])
    )
    (pair,) = pairs_of(comparable)
    assert pair.p == pytest.approx(mcnemar(10, 0)) and pair.relation == "ahead"


def test_a_check_that_failed_on_fewer_images_marks_the_row_on_all() -> None:
    some = rights(40, 100, scope="test_100", findings=(finding(False),))
    every = rights(400, findings=(finding(True),))
    comparables = comparable_runs(settings_of([trained("a", evaluations=[some, every])]))
    assert len(comparables) == 2 and all(
        not a.rows[0].trusted and a.leader is None for a in comparables
    )


def test_an_unchecked_seed_beside_a_checked_one_is_marked_by_its_tag_and_told() -> None:
    comparable = alone(
        trained("a", 0, evaluations=[rights(900, findings=(finding(True),))]),
        trained("a", 1, evaluations=[rights(800)], tags={"checks": "FAILED: zero_gradients"}),
    )
    assert comparable.rows[0].failed == ("zero_gradients",)
    assert any("without checks" in note for note in comparable.notes)


def test_a_tag_marks_a_run_whose_evaluation_cannot_be_read() -> None:
    comparable = alone(trained("a", tags={"checks": "FAILED: zero_gradients"}), trained("b"))
    rows = {row.label: row for row in comparable.rows}
    assert rows["a"].failed == ("zero_gradients",) and rows["b"].trusted
    assert comparable.leader is rows["b"]


def test_a_seed_that_did_not_end_is_not_averaged_beside_those_that_did() -> None:
    ended = [trained("a", seed, robust=[0.6]) for seed in (0, 1)]
    cut = trained("a", 2, cost=23.0, robust=[0.1], status="KILLED")
    (setting,) = settings_of([*ended, cut])
    assert setting.unfinished == (cut,) and len(setting.every) == 3
    (row,) = comparable_runs([setting])[0].rows
    assert row.cost == 230.0 and row.valid().value == pytest.approx(0.6)  # pyright: ignore
    (alone_,) = settings_of([cut])
    assert alone_.runs == (cut,) and alone_.unfinished == ()


def test_seeds_are_counted_by_what_they_are_ranked_by() -> None:
    runs = [trained("a", seed) for seed in range(4)]
    comparable = alone(trained("a", 4, evaluations=[rights(500)]), *runs)
    assert seeds_of(comparable.rows[0], comparable.attack) == "1 of 5"
    assert seeds_of(comparable.rows[0], VALID) == "5"


def test_what_mattered_leaves_out_what_failed_a_check_and_how_it_was_judged() -> None:
    runs = []
    for k in range(24):
        masked = k >= 20
        params = {"optimizer.lr": 0.1 * (k % 5 + 1), "algorithm.trick": "on" if masked else "off"}
        params["evaluation.steps"] = 10 if k else 20
        told = rights(500, findings=(finding(not masked),))
        runs.append(
            trained(
                "a", params=params, robust=[0.9 if masked else 0.1 * (k % 5)], evaluations=[told]
            )
        )
    found = {one.key for one in importance_of(alone(*runs))}
    assert found <= {"optimizer.lr"}


def test_what_an_algorithm_alone_decides_is_no_parameter_of_it() -> None:
    """`steps` of pgd is always 10: what it brings is the choice of pgd."""
    pairs = [("a", k % 5 + 1) for k in range(20)] + [("pgd", 10) for _ in range(20)]
    runs = [
        trained(
            name,
            params={"algorithm.steps": steps, "optimizer.lr": 0.01 * (k + 1)},
            robust=[0.01 * k],
        )
        for k, (name, steps) in enumerate(pairs)
    ]
    found = {one.key: one.trials for one in importance_of(alone(*runs))}
    assert found == {"algorithm.name": 40, "optimizer.lr": 40, "algorithm.steps": 20}


def test_stopped_configurations_count_for_importance_at_equal_cost() -> None:
    runs = [
        trained(
            params={"optimizer.lr": 0.01 * (k + 1)},
            robust=[0.01 * k] * (2 if k % 3 else 6),
            cost=20.0 if k % 3 else 60.0,
            tags={"outcome": "stopped" if k % 3 else "complete"},
        )
        for k in range(30)
    ]
    comparable = alone(*runs)
    equal = equal_cost_of(comparable)
    assert equal is not None and (equal.cost, equal.trials) == (20.0, 30)
    assert [one.trials for one in equal.importances] == [30]
    assert [one.trials for one in importance_of(comparable)] == [10]
    assert equal_cost_of(alone(*runs[::3])) is None
