"""raytrain: adversarial training of image classifiers, distributed, tuned and compared.

    run = raytrain.train(algorithm="dynamic", epochs=15, optimizer={"lr": 0.1})
    sweep = raytrain.tune("search_spaces/quickstart.yaml", trials=20)
    raytrain.evaluate(sweep, attacks="pgd,aa")
    raytrain.compare([run, sweep, "an earlier run"])
    raytrain.export(run, "my-model")
    raytrain.attack(model, images, labels, eps=8 / 255)

Fields are those of the command line; a result stands for its run. Nothing heavy is imported until one of
these names is used.

>>> import raytrain
>>> few = {"name": "digits", "train_size": 200}
>>> run = raytrain.train(data=few, algorithm="fgsm_rs", epochs=1, sentinels=None)
>>> run
TrainResult fgsm_rs-digits-epochs1-train_size200-sentinels_none
  valid/clean         ...
  valid/robust        ...
  cost/fe_per_sample  ...
  run                 ...
  checkpoints         ...
>>> evaluation = raytrain.evaluate(run, attacks="fgsm", images=50, checks=False)
>>> flags = evaluation.frame()
>>> list(flags.columns), len(flags)
(['label', 'predicted', 'clean', 'fgsm'], 50)
>>> float(flags["fgsm"].mean()) == evaluation.accuracies["fgsm"].value
True
>>> rows = raytrain.compare(run).frame()
>>> list(rows["fgsm"]) == [flags["fgsm"].mean()]
True
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raytrain.attacks.functions import attack as attack
    from raytrain.attacks.functions import autoattack as autoattack
    from raytrain.commands.compare import Comparison as Comparison
    from raytrain.commands.compare import compare as compare
    from raytrain.commands.evaluate import EvalResult as EvalResult
    from raytrain.commands.evaluate import evaluate as evaluate
    from raytrain.commands.export import ExportResult as ExportResult
    from raytrain.commands.export import export as export
    from raytrain.commands.status import status as status
    from raytrain.commands.train import TrainResult as TrainResult
    from raytrain.commands.train import train as train
    from raytrain.commands.tune import TuneResult as TuneResult
    from raytrain.commands.tune import tune as tune
    from raytrain.config.run import RunConfig as RunConfig
    from raytrain.core.errors import RequestError as RequestError
    from raytrain.core.errors import TrainingFailed as TrainingFailed
    from raytrain.exporting.safetensors import load_exported as load_exported
    from raytrain.tuning.space.search_space import SearchSpace as SearchSpace

_HOMES = {
    "attack": "raytrain.attacks.functions",
    "autoattack": "raytrain.attacks.functions",
    "train": "raytrain.commands.train",
    "evaluate": "raytrain.commands.evaluate",
    "TrainResult": "raytrain.commands.train",
    "EvalResult": "raytrain.commands.evaluate",
    "status": "raytrain.commands.status",
    "tune": "raytrain.commands.tune",
    "TuneResult": "raytrain.commands.tune",
    "compare": "raytrain.commands.compare",
    "Comparison": "raytrain.commands.compare",
    "SearchSpace": "raytrain.tuning.space.search_space",
    "RunConfig": "raytrain.config.run",
    "export": "raytrain.commands.export",
    "load_exported": "raytrain.exporting.safetensors",
    "ExportResult": "raytrain.commands.export",
    "RequestError": "raytrain.core.errors",
    "TrainingFailed": "raytrain.core.errors",
}

__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'raytrain' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
