"""raytrain: adversarial training of image classifiers, distributed, tuned and compared.

    raytrain.train({"algorithm": "dynamic", "epochs": 15})
    raytrain.tune("search_spaces/quickstart.yaml")
    raytrain.evaluate(run_id)
    raytrain.compare(["sweep-a", "sweep-b"])
    raytrain.export(run_id, "my-model")
    raytrain.attack(model, images, labels, eps=8 / 255)

Nothing heavy is imported until one of these names is used.

>>> import raytrain
>>> run = raytrain.RunConfig.model_validate({"algorithm": "dynamic", "epochs": 30})
>>> run.algorithm.name, run.algorithm.steps, run.threat.eps
('dynamic', 10, 0.1)
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
    from raytrain.commands.train import TrainResult as TrainResult
    from raytrain.commands.train import train as train
    from raytrain.commands.tune import TuneResult as TuneResult
    from raytrain.commands.tune import tune as tune
    from raytrain.config.run import RunConfig as RunConfig
    from raytrain.core.types import RequestError as RequestError
    from raytrain.core.types import TrainingFailed as TrainingFailed
    from raytrain.exporting.safetensors import load_exported as load_exported
    from raytrain.tuning.space.search_space import SearchSpace as SearchSpace

_HOMES = {
    "attack": "raytrain.attacks.functions",
    "autoattack": "raytrain.attacks.functions",
    "train": "raytrain.commands.train",
    "evaluate": "raytrain.commands.evaluate",
    "TrainResult": "raytrain.commands.train",
    "EvalResult": "raytrain.commands.evaluate",
    "tune": "raytrain.commands.tune",
    "TuneResult": "raytrain.commands.tune",
    "compare": "raytrain.commands.compare",
    "Comparison": "raytrain.commands.compare",
    "SearchSpace": "raytrain.tuning.space.search_space",
    "RunConfig": "raytrain.config.run",
    "export": "raytrain.commands.export",
    "load_exported": "raytrain.exporting.safetensors",
    "ExportResult": "raytrain.commands.export",
    "RequestError": "raytrain.core.types",
    "TrainingFailed": "raytrain.core.types",
}

__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'raytrain' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
