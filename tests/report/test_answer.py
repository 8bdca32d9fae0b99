"""Which configuration is said to lead, what is said to be undecided, and what to run next."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_helpers import evaluated, flags_of, trained

from raytrain.evaluation.confidence import wilson
from raytrain.evaluation.names import words_for
from raytrain.evaluation.settings import EvaluationSettings
from raytrain.report.answer import Answer, answer_of
from raytrain.report.bands import bands_of
from raytrain.report.comparable import ComparableRuns, comparable_runs
from raytrain.report.configurations import settings_of
from raytrain.report.pairs import pairs_of
from raytrain.report.runs import Trained
from raytrain.report.styles import algorithms_of, looks_of


def alone(*runs: Trained) -> ComparableRuns:
    (comparable,) = comparable_runs(settings_of(runs))
    return comparable


def answered(*runs: Trained) -> Answer:
    comparable = alone(*runs)
    return answer_of(comparable, pairs_of(comparable))


def shares(count: int, of: int = 100) -> dict[str, tuple[int, int]]:
    return {"pgd20": (count, of)}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 99), st.integers(0, 99))
def test_without_flags_a_leader_is_decided_if_and_only_if_intervals_are_apart(
    one: int, other: int
) -> None:
    answer = answered(
        trained("a", evaluations=[evaluated(shares=shares(one))]),
        trained("b", evaluations=[evaluated(shares=shares(other))]),
    )
    high, low = max(one, other), min(one, other)
    apart = wilson(low, 100).high < wilson(high, 100).low
    assert answer.decided is apart
    assert ("leads" in answer.text) is apart and ("Not decided" in answer.text) is not apart


def test_a_sentence_has_run_algorithm_accuracy_interval_attack_and_cost() -> None:
    limits = wilson(80, 100)
    answer = answered(
        trained("pgd", evaluations=[evaluated(shares=shares(80))]),
        trained("natural", evaluations=[evaluated(shares=shares(10))]),
    )
    interval = f"[{100 * limits.low:.1f}, {100 * limits.high:.1f}]"
    assert answer.text == (
        "digits, linf eps 0.1, 100 test images: A, run pgd of seed 0 (pgd), leads: "
        f"80.0 % {interval} under PGD-20, at 230 FE per training image. "
        "Its interval is above that of the other one."
    )
    assert answer.decided and (answer.next, answer.command) == ("", "")


def test_the_paired_test_is_believed_before_the_intervals() -> None:
    # Ten images apart and none the other way: McNemar's p is 0.002, the intervals overlap.
    flags = {
        name: flags_of({"pgd20": [k < n for k in range(100)]})
        for name, n in (("a", 55), ("b", 45))
    }
    answer = answered(*[trained(n, evaluations=[evaluated(flags[n])]) for n in flags])
    assert wilson(45, 100).high > wilson(55, 100).low
    assert answer.decided and "On the same images it is ahead of the other one" in answer.text


def test_validation_has_the_interval_of_its_images_and_names_its_attack() -> None:
    params = {"evaluation.attack": "pgd", "evaluation.steps": "5", "evaluation.restarts": "2"}
    runs = [
        trained(n, params=params, robust=[v], valid_size=200) for n, v in (("a", 0.9), ("b", 0.5))
    ]
    comparable = alone(*runs)
    cell = comparable.leader and comparable.leader.valid()
    limits = wilson(180, 200)
    assert cell and (cell.value, cell.low, cell.high) == (0.9, limits.low, limits.high)
    answer = answer_of(comparable, [])
    assert answer.decided and "in validation under PGD-5, 2 restarts, at 230 FE" in answer.text
    fewer = alone(trained("a", params={"evaluation.images": "50"}, robust=[0.9], valid_size=200))
    cell = fewer.rows[0].valid()
    assert cell and cell.low == wilson(45, 50).low


def test_without_any_interval_nothing_is_decided() -> None:
    answer = answered(trained("a", robust=[0.9]), trained("b", robust=[0.1]))
    assert not answer.decided and "B (b of seed 0) cannot be told from it" in answer.text


def test_the_only_configuration_leads_nothing() -> None:
    assert "only configuration that can be ranked" in answered(trained("a")).text


# --- what to run next ---------------------------------------------------------------------------


def test_the_next_is_the_best_in_validation_of_what_was_not_evaluated() -> None:
    runs = [trained(n, robust=[v], id=n * 32) for n, v in (("a", 0.3), ("b", 0.9), ("c", 0.6))]
    answer = answered(*runs)
    assert answer.command == f"raytrain evaluate {'b' * 8}"
    assert answer.next.startswith("none of 3 configurations was evaluated on the test set")
    elsewhere = trained("e", robust=[0.99], id="e" * 32, tags={"storage": "my runs"})
    assert answered(elsewhere).command == f"raytrain evaluate {'e' * 8} --storage 'my runs'"
    stopped = trained("d", robust=[0.95], id="d" * 32, tags={"outcome": "stopped"})
    assert answered(*runs, stopped).command == answer.command


def test_the_next_evaluation_is_the_one_that_others_had() -> None:
    part = evaluated(shares={"pgd50x5-eps_8": (9, 20)}, scope="test_20")
    answer = answered(trained("a", evaluations=[part]), trained("b", id="b" * 32))
    words = "attacks=pgd steps=50 restarts=5 step_size=eps/8 images=20"
    assert answer.command == f"raytrain evaluate {'b' * 8} {words}"


def test_seeds_that_were_not_evaluated_come_last() -> None:
    told = evaluated(shares=shares(60))
    seeds = [trained("a", 0, evaluations=[told]), trained("a", 1, id="a" * 32)]
    assert answered(*seeds).command == f"raytrain evaluate {'a' * 8} attacks=pgd"
    assert "with all seeds; the next is A (run a of seed 1)" in answered(*seeds).next
    assert answered(*seeds, trained("b", id="b" * 32)).command.split()[2] == "b" * 8


@pytest.mark.parametrize(
    "column", ["fgsm", "pgd20", "pgd50", "pgd20x5", "cw30-eps_8", "apgd", "aa"]
)
def test_the_words_for_a_column_measure_it(column: str) -> None:
    values = dict(word.split("=") for word in words_for(column))
    assert column in EvaluationSettings.model_validate(values).names


# --- tables and looks ---------------------------------------------------------------------------


def trial(number: int, cost: float, value: float, stopped: bool, name: str = "pgd") -> Trained:
    tags = {"trial": f"t{number}", "outcome": "stopped" if stopped else "complete"}
    params = {"optimizer.lr": number}
    return trained(name, params=params, robust=[value], cost=cost, tags=tags)


def test_bands_fall_in_cost_and_fold_what_was_stopped_early() -> None:
    runs = [
        trial(0, 230, 0.5, False),
        trial(1, 228, 0.7, False),
        trial(2, 60, 0.4, True),
        trial(3, 60, 0.3, True),
        trial(4, 230, 0.2, True),
    ]
    bands = bands_of(alone(*runs))
    names = [[[row.setting.names for row in some] for some in (b.shown, b.folded)] for b in bands]
    assert names == [[["t1", "t0"], ["t4"]], [[], ["t2", "t3"]]]
    assert [band.cost for band in bands] == ["228 to 230", "60"]
    assert bands[1].summary == (
        "2 stopped early; the best is C (t2): 40.0 % in validation, on the Pareto front"
    )


def test_nothing_is_folded_where_all_were_stopped_early() -> None:
    bands = bands_of(alone(trial(0, 60, 0.5, True), trial(1, 60, 0.4, True)))
    assert [len(band.shown) for band in bands] == [2] and bands[0].folded == []


def test_what_was_evaluated_is_not_folded() -> None:
    told = trained(
        params={"optimizer.lr": 9},
        tags={"outcome": "stopped"},
        evaluations=[evaluated(shares=shares(50))],
    )
    (band,) = bands_of(alone(told, trial(1, 230, 0.9, False)))
    assert band.folded == [] and len(band.shown) == 2


def test_trials_of_several_sweeps_are_named_after_both() -> None:
    one = trained("a", tags={"sweep": "x", "trial": "t0001"})
    other = trained("b", tags={"sweep": "y", "trial": "t0001"})
    assert [group.names for group in settings_of([one])] == ["t0001"]
    assert [group.names for group in settings_of([one, other])] == ["x/t0001", "y/t0001"]
    seeds = [trained("c", seed) for seed in range(5)]
    assert settings_of(seeds)[0].names == "c of seed 0, c of seed 1, c of seed 2 and 2 more"


def test_a_colour_is_an_algorithm_and_lines_tell_its_configurations_apart() -> None:
    runs = [trial(k, 100 + 30 * k, 0.1 * k, False, "abc"[k % 3]) for k in range(6)]
    comparable = alone(*runs)
    looks = looks_of(comparable)
    by_name = {}
    for row in comparable.rows:
        by_name.setdefault(row.setting.algorithm, []).append(looks[row.letter])
    for some in by_name.values():
        assert len({(look.colour, look.marker) for look in some}) == 1
        assert len({look.line for look in some}) == len(some)
    colours = {name: some[0].colour for name, some in by_name.items()}
    assert len(set(colours.values())) == 3 and algorithms_of(comparable, looks) == colours


def test_colours_need_no_explanation_where_each_is_one_configuration_or_all_are_one() -> None:
    each = alone(*[trial(k, 100, 0.1 * k, False, "abc"[k]) for k in range(3)])
    one = alone(*[trial(k, 100, 0.1 * k, False) for k in range(3)])
    assert algorithms_of(each, looks_of(each)) == {} == algorithms_of(one, looks_of(one))
    assert len({look.colour for look in looks_of(one).values()}) == 3
