"""What may be compared with what: the same test images under the same threat model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from raytrain.evaluation.contract import threat_in
from raytrain.evaluation.names import attack_title, strongest_first
from raytrain.report.configurations import ConfigurationGroup
from raytrain.report.evaluations import EvaluatedRun
from raytrain.report.rows import (
    VALID,
    Row,
    notes_on,
    order,
    ranked,
    shared_attack,
    validation_of,
    value_of,
)
from raytrain.report.runs import Trained


@dataclass(frozen=True)
class ComparableRuns:
    """Rows that may be ranked against each other: by band of cost, the best of a band first."""

    title: str
    data: str
    threat: str
    images: int  # of the test set; 0 where nothing was evaluated
    attack: str  # what they are ranked by; VALID for validation
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def attacks(self) -> list[str]:
        """All attacks of some row, strongest first."""
        return strongest_first([a for row in self.rows for one in row.best for a in one.attacks])

    @property
    def leader(self) -> Row | None:
        """The best that can be trusted, at whatever cost."""
        ranked = [
            row for row in self.rows if row.trusted and value_of(row, self.attack) is not None
        ]
        return max(ranked, key=lambda row: value_of(row, self.attack) or 0.0, default=None)

    @property
    def judged_by(self) -> str:
        """In words."""
        if self.attack == VALID:
            return "robust accuracy in validation, best epoch"
        return f"accuracy under {attack_title(self.attack)} on the test set"


def comparable_runs(settings: list[ConfigurationGroup]) -> list[ComparableRuns]:
    """Every arena, the one with most rows first."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for setting in settings:
        for key, row in _rows(setting, _cost(setting)):
            found.setdefault(key, []).append(row)
    _join_unevaluated(found)
    made = _distinct_titles([(key, _arena(key, rows)) for key, rows in found.items()])
    made.sort(key=lambda comparable: (-sum(row.home for row in comparable.rows), comparable.title))
    return _lettered(made)


Key = tuple[str, str, str, str]  # data, contract, test images, how validation was done


def _rows(setting: ConfigurationGroup, cost: float | None) -> list[tuple[Key, Row]]:
    """The configuration in each arena that it has numbers for, and at home in any case."""
    here: dict[Key, dict[str, list[EvaluatedRun]]] = {}
    for run in setting.runs:
        for one in run.evaluations:
            contract = _contract(run) if one.same_contract else _contract_under(one)
            key = (_data(run), contract, f"{one.images} {one.test_set}", "")
            here.setdefault(key, {}).setdefault(one.checkpoint, []).append(one)
    first = setting.first
    own = _contract(first)
    if not any(key[1] == own for key in here):
        here[(_data(first), own, "", validation_of(first))] = {}
    return [
        (
            key,
            Row(
                setting=setting,
                home=key[1] == own,
                best=tuple(by.get("best", ())),
                last=tuple(by.get("last", ())),
                cost=cost,
            ),
        )
        for key, by in here.items()
    ]


def _contract(run: Trained) -> str:
    """What two networks must share to be compared: the threat model, whatever their normalisers are."""
    return threat_in(run.contract_text) or run.contract


def _contract_under(evaluation: EvaluatedRun) -> str:
    """The same of an evaluation under another threat model than that of training."""
    text = "" if evaluation.contract is None else evaluation.contract.text
    return threat_in(text) or evaluation.contract_hash


def _data(run: Trained) -> str:
    return " ".join(filter(None, (run.data, run.params.get("data.test_path", ""))))


def _join_unevaluated(found: dict[tuple[str, ...], list[Row]]) -> None:
    """Append configurations without test results to the arena with results, where there is just one."""
    for key in [key for key in found if not key[2]]:
        near = [other for other in found if other[:2] == key[:2] and other[2]]
        if len(near) == 1:
            found[near[0]] += found.pop(key)


def _cost(setting: ConfigurationGroup) -> float | None:
    costs = (run.per_image(run.metrics.get("cost/fe")) for run in setting.runs)
    return _mean([cost for cost in costs if cost is not None])


def _mean(values: list[float]) -> float | None:
    return sum(values, 0.0) / len(values) if values else None


def _arena(key: tuple[str, ...], rows: list[Row]) -> ComparableRuns:
    data, contract, test, _ = key
    first = rows[0].setting.first
    threat = next((row.setting.first.contract_text for row in rows if row.home), contract)
    texts = [
        one.contract.text for row in rows for one in row.best if one.contract and one.contract.text
    ]
    threat = texts[0] if texts else threat
    if len(set(texts)) > 1:  # other normalisers
        threat = threat_in(threat) or threat
    count = int(test.split()[0]) if test else 0
    attack = shared_attack(rows)
    where = f"{count:,} test images" if count else "validation only"
    return ComparableRuns(
        title=f"{data or first.data}, {_short(threat)}, {where}",
        data=first.data,
        threat=threat,
        images=count,
        attack=attack,
        rows=tuple(ranked(rows, attack)),
        notes=tuple(notes_on(rows)),
    )


def _distinct_titles(made: list[tuple[tuple[str, ...], ComparableRuns]]) -> list[ComparableRuns]:
    """Make titles unique, with hashes where need be."""
    titles = [comparable.title for _, comparable in made]
    done = []
    for number, (key, comparable) in enumerate(made):
        if titles.count(comparable.title) > 1:
            _, contract, test, _ = key
            said = [f"contract {contract[:12]}", f"test set {test.split()[-1]}" if test else ""]
            same = titles[:number].count(comparable.title) + 1
            words = ", ".join(filter(None, [*said, f"part {same}"]))
            comparable = replace(comparable, title=f"{comparable.title} ({words})")
        done.append(comparable)
    return done


def _short(threat: str) -> str:
    return threat.partition(" in [")[0]


def _lettered(comparables: list[ComparableRuns]) -> list[ComparableRuns]:
    """A configuration has one letter in the whole report, by its place in the first arena."""
    letters: dict[int, str] = {}
    for comparable in comparables:
        best_first = sorted(comparable.rows, key=lambda row: order(row, comparable.attack))
        for row in best_first:
            letters.setdefault(id(row.setting), _letter(len(letters)))
    return [
        replace(a, rows=tuple(replace(r, letter=letters[id(r.setting)]) for r in a.rows))
        for a in comparables
    ]


def _letter(number: int) -> str:
    """A to Z, then AA, AB and so on."""
    first, last = divmod(number, 26)
    return (_letter(first - 1) if first else "") + chr(ord("A") + last)
