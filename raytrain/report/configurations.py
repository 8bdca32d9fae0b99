"""Runs that differ in nothing but their seed are one configuration."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from raytrain.report.runs import Trained
from raytrain.tuning.space.labels import describe

_APART = ("seed",)  # what seeds of one configuration differ in
_NAMED = 3  # runs whose names stand beside a configuration
_SPELLED = ("evaluation.", "sentinels.", "data.")  # whose last words alone would mislead


@dataclass(frozen=True)
class ConfigurationGroup:
    """A configuration and its runs, one per seed."""

    label: str
    runs: tuple[Trained, ...]  # by seed
    run_names: tuple[str, ...]  # of these
    repeats: tuple[Trained, ...] = ()  # of a seed that is there: not independent, not averaged
    unfinished: tuple[Trained, ...] = ()  # beside seeds that have ended: not averaged

    @property
    def every(self) -> tuple[Trained, ...]:
        """Also those that are not averaged."""
        return (*self.runs, *self.repeats, *self.unfinished)

    @property
    def names(self) -> str:
        """Of its runs, the first of many."""
        return _joined(self.run_names, _NAMED)

    @property
    def short_names(self) -> str:
        """Of its first run, and how many there are."""
        return _joined(self.run_names, 1)

    @property
    def first(self) -> Trained:
        """Any of them: they agree in all but the seed."""
        return self.runs[0]

    @property
    def algorithm(self) -> str:
        """By name."""
        return self.first.algorithm


def settings_of(runs: Iterable[Trained]) -> list[ConfigurationGroup]:
    """Configurations in the order in which they were first tried."""
    runs = list(runs)
    several = len({run.tags.get("sweep") for run in runs}) > 1
    groups: dict[tuple[Any, ...], list[Trained]] = {}
    for run in sorted(runs, key=lambda run: (run.began, run.id)):
        groups.setdefault(_key(run), []).append(run)
    labels = _labels([group[0] for group in groups.values()])
    pairs = zip(labels, groups.values(), strict=True)
    return [_setting(label, group, several) for label, group in pairs]


def _key(run: Trained) -> tuple[Any, ...]:
    params = tuple(sorted((k, v) for k, v in run.params.items() if k not in _APART))
    return (params, run.contract) if params else (run.id,)


def _setting(label: str, group: list[Trained], several: bool) -> ConfigurationGroup:
    """Of several runs of one seed the one with the most evaluations, then the latest."""
    by_seed: dict[str, list[Trained]] = {}
    for run in group:
        by_seed.setdefault(run.seed, []).append(run)
    chosen, others = [], []
    for _, some in sorted(by_seed.items(), key=lambda item: (len(item[0]), item[0])):
        some.sort(key=lambda run: (len(run.evaluations), run.ended, run.began))
        *rest, best = some
        chosen.append(best)
        others += rest
    ended = [run for run in chosen if run.ended or run.evaluations]
    unfinished = [run for run in chosen if run not in ended] if ended else []
    runs = tuple(ended or chosen)
    return ConfigurationGroup(label, runs, _names(runs, several), tuple(others), tuple(unfinished))


def _joined(names: Sequence[str], most: int) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _names(runs: Sequence[Trained], several: bool) -> tuple[str, ...]:
    """Of the runs, trials by their handles (after the sweep's name where there are `several`)."""
    sweeps = [f"{run.tags['sweep']}/" if several and "sweep" in run.tags else "" for run in runs]
    return tuple(sweep + run.short for sweep, run in zip(sweeps, runs, strict=True))


def _labels(runs: list[Trained]) -> list[str]:
    """What each is beside the others: its algorithm, and the numbers in which they differ; of an imported
    network its name.
    """
    kinds: dict[str, list[Trained]] = {}
    trained = [run for run in runs if not run.imported]
    for run in trained:
        kinds.setdefault(run.algorithm, []).append(run)
    shared = _differing(trained)
    own = {kind: _differing(some) for kind, some in kinds.items()}
    return [run.name if run.imported else _label(run, shared, own[run.algorithm]) for run in runs]


def _label(run: Trained, shared: list[str], own: list[str]) -> str:
    if not run.params:
        return run.name
    names = [n for n in own if n.startswith("algorithm.")]
    names += [n for n in shared if not n.startswith(("algorithm.", "outer."))]
    names += [n for n in own if n.startswith("outer.") and n != "outer.name"]
    outer = run.params.get("outer.name", "sgd")
    head = run.algorithm + ("" if outer == "sgd" else f" + {outer}")
    params = {name: _value(run.params[name]) for name in names if name in run.params}
    plain = {name: value for name, value in params.items() if not name.startswith(_SPELLED)}
    spelled = [f"{name}={value}" for name, value in params.items() if name.startswith(_SPELLED)]
    return " ".join(filter(None, [head, describe(plain), *spelled]))


def _differing(runs: list[Trained]) -> list[str]:
    """Parameters in which they differ, in the order of the configuration."""
    names = dict.fromkeys(name for run in runs for name in run.params if name not in _APART)
    hidden = ("algorithm.name", "outer.name")
    runs = [run for run in runs if run.params]
    return [n for n in names if n not in hidden and len({r.params.get(n) for r in runs}) > 1]


def varied(settings: Iterable[ConfigurationGroup]) -> list[dict[str, Any]]:
    """Of each, the parameters in which some of these differ, the seed left out.

    Those of an algorithm or outer update only if they differ among the configurations with the same one:
    the others are decided by its name.
    """
    runs = [setting.first for setting in settings]
    tried: dict[tuple[str, str], set[str]] = {}
    for run in runs:
        for name, value in run.params.items():
            tried.setdefault((name, _kind(name, run)), set()).add(value)
    everywhere = {
        name: len({run.params.get(name) for run in runs}) for run in runs for name in run.params
    }
    return [
        {
            name: _value(value)
            for name, value in run.params.items()
            if name not in _APART
            and (len(tried[name, _kind(name, run)]) if _kind(name, run) else everywhere[name]) > 1
        }
        for run in runs
    ]


def _kind(name: str, run: Trained) -> str:
    """The algorithm or outer update that a parameter is of; empty for others and their names."""
    chooser = f"{name.partition('.')[0]}.name"
    own = name != chooser and chooser in ("algorithm.name", "outer.name")
    return run.params.get(chooser, "") if own else ""


def _value(text: str) -> Any:
    """A parameter as what it was before MLflow made it a string."""
    with contextlib.suppress(ValueError):
        return int(text)
    with contextlib.suppress(ValueError):
        return float(text)
    return text
