"""A configuration beside others, and the order of several."""

from __future__ import annotations

from dataclasses import dataclass, replace

from raytrain.evaluation.names import strongest_first
from raytrain.report.cells import Cell, of_shares
from raytrain.report.configurations import ConfigurationGroup
from raytrain.report.evaluations import EvaluatedRun
from raytrain.report.runs import Trained, split_of

VALID = "valid"
"""What configurations are ranked by where none was evaluated on the test set."""

ALIKE = 1.1
"""Costs within this factor of one another count as equal."""


@dataclass(frozen=True)
class Row:
    """A configuration in one arena."""

    setting: ConfigurationGroup
    home: bool  # trained for this arena's threat model
    best: tuple[EvaluatedRun, ...] = ()  # of the best checkpoints here, by seed
    last: tuple[EvaluatedRun, ...] = ()  # of the last ones
    cost: float | None = None  # FE per training image, mean over seeds
    letter: str = ""
    band: int = 0  # of cost, from the cheapest
    rank: int | None = None  # in its band; None where it has not what is ranked by
    front: bool = False

    @property
    def label(self) -> str:
        """In words."""
        return self.setting.label

    @property
    def stopped(self) -> bool:
        """A pruner ended it: its numbers are not those of whole runs."""
        return all(run.stopped for run in self.setting.runs)

    @property
    def trusted(self) -> bool:
        """No check has failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        """What failed, each once, under this threat model, on whatever number of test images."""
        threats = {(one.contract_hash, one.same_contract) for one in (*self.best, *self.last)}
        sentences: list[str] = []
        for run in self.setting.runs:
            own = [e for e in run.evaluations if (e.contract_hash, e.same_contract) in threats]
            sentences += [f"{f.check}: {f.sentence}" for one in own for f in one.failed]
            # The tag counts where files are missing or without findings.
            if not own or not all(one.findings for one in own):
                sentences += filter(None, [run.failed_checks])
        return tuple(dict.fromkeys(sentences))

    @property
    def unchecked(self) -> bool:
        """Evaluated without checks, by one seed at least."""
        return any(not one.findings for one in self.best)

    @property
    def marks(self) -> str:
        """Behind every number of this row: ⚠ a check failed, † trained for another threat model."""
        return ("" if self.trusted else "⚠") + ("" if self.home else "†")

    def score(self, attack: str, last: bool = False) -> Cell | None:
        """Accuracy under an attack (or `clean`), of the best or the last checkpoints."""
        found = self.last if last else self.best
        return of_shares([one.accuracies[attack] for one in found if attack in one.accuracies])

    def valid(self, metric: str = "valid/robust", last: bool = False) -> Cell | None:
        """The same on the validation split, at the best or the last epoch."""
        runs = self.setting.runs if self.home else ()
        found = [run.valid(metric, last) for run in runs]
        return of_shares([share for share in found if share is not None])

    def ranking_cell(self, attack: str) -> Cell | None:
        """The value it is ranked by."""
        return self.valid() if attack == VALID else self.score(attack)

    def gap(self, attack: str) -> tuple[str, Cell | None, Cell | None]:
        """Where it was measured, and robust accuracy at the best and at the last epoch."""
        if attack != VALID and (last := self.score(attack, last=True)) is not None:
            return "test", self.score(attack), last
        return "validation", self.valid(), self.valid(last=True)


def shared_attack(rows: list[Row]) -> str:
    """The strongest attack that all evaluated rows have; else the one that most have."""
    evaluated = [row for row in rows if row.best]
    attacks = strongest_first([a for row in evaluated for one in row.best for a in one.attacks])
    if not attacks:
        return VALID
    return max(attacks, key=lambda a: sum(row.score(a) is not None for row in evaluated))


def value_of(row: Row, attack: str) -> float | None:
    cell = row.ranking_cell(attack)
    return None if cell is None else cell.value


def ranked(rows: list[Row], attack: str) -> list[Row]:
    """By cost in bands, within a band by accuracy under `attack`; a failed check means no rank."""
    free = sorted((row for row in rows if row.cost is None), key=lambda row: row.label)
    dear = sorted((row for row in rows if row.cost is not None), key=lambda row: row.cost or 0.0)
    bands: list[list[Row]] = []
    for row in dear:
        if not bands or (row.cost or 0.0) > ALIKE * (bands[-1][0].cost or 0.0):
            bands.append([])
        bands[-1].append(row)
    front = {id(row) for row in _front(bands, attack)}
    done: list[Row] = []
    if free:
        bands.append(free)
    for number, band in enumerate(bands):
        band.sort(key=lambda row: order(row, attack))
        ranks = iter(range(1, len(band) + 1))
        for row in band:
            counts = row.trusted and value_of(row, attack) is not None
            rank = next(ranks) if counts else None
            done.append(replace(row, band=number, rank=rank, front=id(row) in front))
    return done


def order(row: Row, attack: str) -> tuple[bool, bool, float, float]:
    value, valid = value_of(row, attack), row.valid()
    return (
        value is None,
        not row.trusted,
        -(value or 0.0),
        -(valid.value if valid is not None else 0.0),
    )


def _front(bands: list[list[Row]], attack: str) -> list[Row]:
    """The best of each band of cost that beats all cheaper ones; only what can be trusted."""
    front: list[Row] = []
    least = -1.0
    for band in bands:
        known = [row for row in band if row.trusted and value_of(row, attack) is not None]
        best = max(known, key=lambda row: value_of(row, attack) or 0.0, default=None)
        if best is not None and (value_of(best, attack) or 0.0) > least:
            least = value_of(best, attack) or 0.0
            front.append(best)
    return front


def notes_on(rows: list[Row]) -> list[str]:
    notes = []
    home = [run for row in rows if row.home for run in row.setting.runs]
    ways = {validation_of(run) for run in home if not run.imported}
    if len(ways) > 1:
        notes.append(
            "Validation was not done alike in all rows (another split or attack): do not compare "
            "the validation columns down the table."
        )
    distrusted = [row for row in rows if not row.trusted]
    if distrusted:
        notes.append(
            f"{len(distrusted)} of {len(rows)} configurations failed a check (⚠): their robust "
            "accuracy is not to be believed, and they are neither ranked nor on the front."
        )
    unchecked = sum(row.unchecked for row in rows)
    if unchecked:
        notes.append(
            f"{unchecked} of {len(rows)} configurations were evaluated without checks, or the findings "
            "are missing: there is no evidence that their robust accuracy holds."
        )
    if any(not row.home for row in rows):
        notes.append(
            "† was trained for another threat model than the one it is measured under here."
        )
    imported = sum(row.setting.first.imported for row in rows)
    if imported:
        notes.append(
            f"{imported} of {len(rows)} configurations are networks that were not trained here: their "
            "training cost is not known, and they are not on the front."
        )
    machines = {run.tags.get("hardware") for row in rows for run in row.setting.runs}
    if len(machines) > 1:
        notes.append("Seconds are of different hardware; forward-equivalents are not.")
    return notes


def validation_of(run: Trained) -> str:
    """Runs that agree in this have comparable numbers in validation."""
    attack = sorted((k, v) for k, v in run.params.items() if k.startswith("evaluation."))
    return repr((split_of(run), attack))
