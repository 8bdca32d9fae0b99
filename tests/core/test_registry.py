"""Parts by name: raytrain's own, entry points of installed packages, and classes at an address."""

from __future__ import annotations

import pickle
import sys
import textwrap
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from helpers import ball_of, batch_of, state_of, tiny_net

from raytrain.algorithms import RECIPES, AbstractRecipe, Pgd
from raytrain.config.cost_estimate import estimate_cost
from raytrain.config.field_list import below, fields_of
from raytrain.config.json_schema import run_schema
from raytrain.config.request import as_run
from raytrain.config.run import RunConfig
from raytrain.config.run_file import complete_run_file
from raytrain.core.errors import RequestError
from raytrain.core.registry import Registry
from raytrain.testing import AlgorithmConformance
from raytrain.training.checkpoint import load
from raytrain.tuning.space.checks import check
from raytrain.tuning.space.draws import Draw
from raytrain.tuning.space.search_space import SearchSpace

MODULE = '''
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from raytrain.algorithms import Nested
from raytrain.algorithms.base import Iterated, Smoothed
from raytrain.core.card import Card, Range
from raytrain.core.losses import CrossEntropy
from raytrain.core.types import SCHEDULABLE
from raytrain.outer.base import AbstractOuter


class Half(Smoothed, Iterated):
    """PGD with a part of the steps."""

    card: ClassVar[Card] = Card(paper="none", rule="PGD", cost="steps + 3 FE", norms=("linf",))
    share: Annotated[float, SCHEDULABLE, Field(gt=0, le=1)] = 0.5
    note: str = ""
    on: bool = True

    def assemble(self, ball, outer):
        steps = round(self.share * self.steps)
        attack = self.attack().model_copy(update={"steps": steps})
        return Nested(ball, attack, outer, self.cross_entropy())


class Sign(AbstractOuter):
    """theta <- optimizer(theta, sign g)."""

    card: ClassVar[Card] = Card(paper="none", rule="sign", cost="3 FE")
    name: Literal["sign"] = "sign"

    def step(self, state, rate=1.0):
        for parameter in state.model.parameters():
            parameter.grad = parameter.grad.sign()
        super().step(state, rate)


class Hinge(CrossEntropy.__mro__[1]):
    """max(0, margin)."""

    def outer(self, predict, batch, delta, reference):
        logits = predict(batch.images + delta)
        own = logits.gather(1, batch.labels[:, None])
        return (1 + logits - own).clamp_min(0).sum(1) - 1


class Nothing:
    pass
'''


@pytest.fixture(scope="module", autouse=True)
def module(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The user's module, importable, and announced under entry points."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "mine.py").write_text(textwrap.dedent(MODULE))
    info = folder / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[raytrain.algorithms]\nhalf = mine:Half\nbroken = nowhere:Half\npgd = mine:Half\n"
        "[raytrain.outers]\nsign = mine:Sign\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield folder
    sys.modules.pop("mine", None)


@pytest.fixture
def plugins(module: Path) -> Registry[AbstractRecipe]:
    """A registry that has not looked for entry points yet."""
    del module
    registry = Registry(AbstractRecipe, "name", group="raytrain.algorithms")
    registry.register(Pgd)
    return registry


def test_an_address_is_an_algorithm_with_fields_of_its_own(tmp_path: Path) -> None:
    words = ["algorithm=mine:Half", "algorithm.share=0.25", "algorithm.on=false"]
    run = as_run(None, [*words, "algorithm.steps=8"])
    assert run.algorithm.model_dump(include={"name", "share", "on"}) == {
        "name": "mine:Half",
        "share": 0.25,
        "on": False,
    }
    assert estimate_cost(run) == 15 * (2 * 2 + 3)
    file = tmp_path / "run.yaml"
    file.write_text("algorithm: {name: 'mine:Half', share: 0.25, steps: 8, on: false}\n")
    assert as_run(file) == run and as_run(file).signature() == run.signature()
    assert RunConfig.model_validate_json(run.model_dump_json()) == run


def test_its_fields_are_found_like_those_of_any_other(tmp_path: Path) -> None:
    run = as_run(None, ["algorithm=mine:Half", "algorithm.share=0.25"])
    (share,) = below(fields_of(run), "algorithm.share")
    assert (share.values, share.default, share.value) == ("float > 0, <= 1", 0.5, 0.25)
    file = tmp_path / "run.yaml"
    file.write_text(complete_run_file(run))
    assert as_run(file) == run
    records = run_schema()["properties"]["algorithm"]["anyOf"][-1]
    assert "mine:Half" in records["discriminator"]["mapping"]


def test_it_is_pickled_by_its_name_and_its_record() -> None:
    recipe = as_run(None, ["algorithm=mine:Half", "algorithm.share=0.3"]).algorithm
    again = pickle.loads(pickle.dumps(recipe))
    assert again == recipe and type(again) is type(recipe)


def test_its_numbers_may_change_over_training() -> None:
    run = as_run({"algorithm": "mine:Half", "curriculum": {"share": {"start": 0.1}}})
    assert estimate_cost(run) < estimate_cost(as_run({"algorithm": "mine:Half"}))
    with pytest.raises(RequestError, match="expected eps or steps or step_size or share"):
        as_run({"algorithm": "mine:Half", "curriculum": {"on": {"start": 0}}})


def test_it_is_searched_like_any_other() -> None:
    space = SearchSpace.model_validate(
        {
            "name": "half",
            "base": {"epochs": 2},
            "space": {
                "algorithm.name": {"choice": ["pgd", "mine:Half"]},
                "algorithm.share": {
                    "float": [0.1, 0.9],
                    "when": {"algorithm.name": "mine:Half"},
                },
            },
            "budget": {"trials": 2},
        }
    )
    check(space)
    drawn = [space.run(space.sample(Draw(seed, {}))) for seed in range(10)]
    assert {run.algorithm.name for run in drawn} == {"pgd", "mine:Half"}


def test_it_trains_and_is_resumed(tmp_path: Path) -> None:
    from raytrain.core.distributed_context import DistributedContext
    from raytrain.training.trainer import fit_and_checkpoint

    base = {"data": {"name": "digits", "train_size": 128}, "epochs": 2, "outer": "mine:Sign"}
    run = as_run({**base, "algorithm": {"name": "mine:Half", "steps": 2}})
    rows = list(fit_and_checkpoint(run, DistributedContext(), tmp_path))
    saved = load(tmp_path / "last.pt")
    assert saved.run == run and rows[-1].final
    assert rows[-1].fe == 2 * 128 * (2 * 1 + 3)


def test_a_loss_from_outside_is_trained_on() -> None:
    parts = {"attack": {"steps": 1, "step_size": "eps", "bn": "eval"}, "objective": "mine:Hinge"}
    run = as_run({"algorithm": {"name": "nested", **parts}})
    algorithm = run.algorithm.build(ball_of("linf"), run.outer)
    outcome = algorithm.step(state_of(tiny_net(), algorithm), batch_of(8))
    assert outcome.losses.shape == (8,) and bool((outcome.losses >= 0).all())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("algorithm=mine:Nope", "algorithm.name: mine:Nope is not a subclass of"),
        ("algorithm=mine:Nothing", "algorithm.name: mine:Nothing is not a subclass of"),
        ("outer=mine:Half", "outer.name: mine:Half is not a subclass of"),
        ("algorithm=nowhere:Half", "algorithm.name: nowhere cannot be imported"),
        ("algorithm=mine:9", "algorithm.name: 'mine:9' is not of the form module:Class"),
        ("algorithm.name=mine:Half algorithm.shrae=1", "algorithm.shrae: no such field; the near"),
        ("algorithm.name=mine:Half algorithm.share=2", "algorithm.share: expected less than or"),
        ("algorithm.name=mine:Half threat.norm=l2 threat.eps=1", "threat.norm: mine:Half is not"),
    ],
)
def test_what_is_wrong_with_it_is_one_sentence(change: str, sentence: str) -> None:
    with pytest.raises(RequestError) as caught:
        as_run(None, change.split())
    assert str(caught.value).startswith(sentence) and "\n" not in str(caught.value)


def test_an_entry_point_is_an_algorithm_under_its_name(plugins: Registry[AbstractRecipe]) -> None:
    assert {"half", "broken"} <= {one.name for one in entry_points(group="raytrain.algorithms")}
    assert list(plugins) == ["pgd", "half", "broken"]
    recipe = plugins["half"].model_validate({"share": 0.5})
    assert recipe.name == "half" and recipe.model_dump()["share"] == 0.5
    assert plugins["pgd"] is Pgd  # raytrain's own names are not taken over


def test_a_broken_entry_point_is_named_when_it_is_used(plugins: Registry[AbstractRecipe]) -> None:
    with pytest.raises(RequestError, match="broken cannot be imported from nowhere:Half"):
        plugins["broken"]
    assert plugins.with_field("steps") == [Pgd]
    assert [part.__name__ for part in plugins.with_field("share")] == ["Half"]


def test_a_part_has_its_own_class_where_the_name_is_the_one_it_is_found_by() -> None:
    assert RECIPES["pgd"] is Pgd
    assert RECIPES["mine:Half"] is RECIPES["mine:Half"]
    assert RECIPES["mine:Half"].__name__ == "Half" and RECIPES["mine:Half"].__doc__


class TestAnAlgorithmFromOutside(AlgorithmConformance):
    @pytest.fixture
    def recipe(self) -> AbstractRecipe:
        return RECIPES["mine:Half"].model_validate({"steps": 4})
