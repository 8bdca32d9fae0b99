"""Settings of the attacks of validation and `raytrain evaluate`, and the stages of the latter."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt

from raytrain.attacks import ProjectedAscent, Uniform
from raytrain.attacks.autoattack import CHEAP, STAGES, Stage
from raytrain.core.types import Spec, StepSize

AttackName = Literal["fgsm", "pgd", "cw", "apgd", "aa"]
ATTACKS: tuple[AttackName, ...] = get_args(AttackName)
CLEAN, NOISE = "clean", "noise"
"""Stages that are no attacks of the result: no perturbation, and random ones, for the checks."""

_OF_STANDARD = "aa."  # before a stage of AutoAttack


def _words(value: Any) -> Any:
    """`pgd,aa` as a list; a repeated name counts once."""
    if isinstance(value, str):
        value = [word.strip() for word in value.split(",")]
    return list(dict.fromkeys(value)) if isinstance(value, list | tuple) else value


class PgdSettings(Spec):
    """PGD from uniform random starts, in eval mode; what survives every restart counts as robust."""

    steps: Annotated[PositiveInt, Field(description="steps of the attack")] = 20
    step_size: StepSize = "eps/4"
    restarts: Annotated[
        PositiveInt, Field(description="random starts, all of which must be survived")
    ] = 1
    images: Annotated[
        PositiveInt | None, Field(description="the first so many images; default: all")
    ] = None
    batch_size: Annotated[PositiveInt, Field(description="images attacked at once")] = 250

    @property
    def ascent(self) -> ProjectedAscent:
        """The attack of one restart."""
        return ProjectedAscent(
            start=Uniform(), steps=self.steps, step_size=self.step_size, bn="eval"
        )

    def named(self, attack: str) -> str:
        """Such as `pgd20`, `pgd20x5` with five restarts."""
        return f"{attack}{self.steps}" + (f"x{self.restarts}" if self.restarts > 1 else "")


class EvaluationSettings(PgdSettings):
    """Attacks on a network, each sample worst-case over all of an attack's attempts.

    `fgsm` is one step of eps from the clean image; `pgd` maximises the cross-entropy, `cw` the
    difference of logits (Carlini & Wagner 2017), both with the fields of `PgdSettings`; `aa` is the
    standard version of AutoAttack, and `apgd` its first two attacks.
    """

    attacks: Annotated[
        tuple[AttackName, ...],
        BeforeValidator(_words),
        Field(min_length=1, description=f"any of {', '.join(ATTACKS)}"),
    ] = ("pgd", "aa")
    seed: NonNegativeInt = 0
    checks: Annotated[bool, Field(description="look for masked gradients and the like")] = True

    @property
    def stages(self) -> tuple[str, ...]:
        """What is run, in order: simple attacks under their own names, AutoAttack's as `aa.NAME`."""
        simple = [self.name_of(name) for name in ("fgsm", "pgd", "cw") if name in self.attacks]
        standard = STAGES if "aa" in self.attacks else CHEAP if "apgd" in self.attacks else ()
        return (*simple, *(_OF_STANDARD + stage for stage in standard))

    @property
    def every_stage(self) -> tuple[str, ...]:
        """All that is run, in order."""
        return (CLEAN, *self.stages, *((NOISE,) if self.checks else ()))

    @property
    def with_gradients(self) -> tuple[str, ...]:
        """The stages whose attacks see gradients."""
        return tuple(stage for stage in self.stages if standard_stage(stage) != "square")

    @property
    def names(self) -> tuple[str, ...]:
        """The columns of the result: attacks in the order from weak to strong."""
        return tuple(self.name_of(name) for name in ATTACKS if name in self.attacks)

    def name_of(self, attack: AttackName) -> str:
        """Such as `pgd20`, `pgd20x5` with five restarts, `pgd20-eps_8` with another step size."""
        if attack not in ("pgd", "cw"):
            return attack
        usual = self.step_size == EvaluationSettings.model_fields["step_size"].default
        step = "" if usual else f"-{str(self.step_size).replace('/', '_')}"
        return self.named(attack) + step


def standard_stage(stage: str) -> Stage | None:
    """AutoAttack's name of a stage, if it is one of its."""
    name = stage.removeprefix(_OF_STANDARD)
    return next((known for known in STAGES if stage != name and known == name), None)


def stages_of(attack: str) -> tuple[str, ...]:
    """The stages that decide an attack of the result: all must be survived."""
    if attack == "aa":
        return tuple(_OF_STANDARD + stage for stage in STAGES)
    if attack == "apgd":
        return tuple(_OF_STANDARD + stage for stage in CHEAP)
    return (attack,)
