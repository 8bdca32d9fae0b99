"""Columns of an evaluation, such as `pgd20x5-eps_8`, as people write them, and how strong they are."""

from __future__ import annotations

import re
from collections.abc import Iterable

_PLAIN = {
    "clean": "clean images",
    "fgsm": "FGSM",
    "apgd": "APGD-CE + APGD-T",
    "aa": "AutoAttack",
}
_STEPS = re.compile(r"(pgd|cw)(\d+)(?:x(\d+))?(?:-(.+))?")
_KINDS = ("clean", "fgsm", "cw", "pgd", "apgd", "aa")  # from weak to strong


def attack_title(column: str) -> str:
    """Such as `PGD-20, 5 restarts, step eps/8`; a column of another kind as it is.

    >>> attack_title("pgd20x5-eps_8"), attack_title("aa")
    ('PGD-20, 5 restarts, step eps/8', 'AutoAttack')
    """
    found = _STEPS.fullmatch(column)
    if found is None:
        return _PLAIN.get(column, column)
    kind, steps, restarts, step_size = found.groups()
    said = [f"{kind.upper()}-{steps}"]
    said += [f"{restarts} restarts"] if restarts and restarts != "1" else []
    said += [f"step {step_size.replace('_', '/')}"] if step_size else []
    return ", ".join(said)


def words_for(column: str) -> list[str]:
    """The words by which `raytrain evaluate` measures a column; none where it does so by itself.

    >>> words_for("pgd50x5-eps_8"), words_for("aa")
    (['attacks=pgd', 'steps=50', 'restarts=5', 'step_size=eps/8'], [])
    """
    found = _STEPS.fullmatch(column)
    if found is None:
        return [f"attacks={column}"] if column in ("fgsm", "apgd") else []
    kind, steps, restarts, step_size = found.groups()
    said = [f"attacks={kind}"] + ([] if steps == "20" else [f"steps={steps}"])
    said += [f"restarts={restarts}"] if restarts and restarts != "1" else []
    return said + ([f"step_size={step_size.replace('_', '/')}"] if step_size else [])


def strongest_first(columns: Iterable[str]) -> list[str]:
    """Each once, from the strongest attack to the weakest, by their names.

    >>> strongest_first(["clean", "pgd20", "aa", "pgd20x5"])
    ['aa', 'pgd20x5', 'pgd20', 'clean']
    """
    return sorted(dict.fromkeys(columns), key=_strength, reverse=True)


def _strength(column: str) -> tuple[int, int, int]:
    found = _STEPS.fullmatch(column)
    if found is not None:
        return _KINDS.index(found[1]), int(found[3] or 1), int(found[2])
    return (_KINDS.index(column) if column in _KINDS else -1), 0, 0
