"""raytrain: adversarial training of image classifiers, distributed, tuned and compared.

    raytrain.train({"algorithm": "dynamic", "epochs": 15})
    raytrain.tune("search_spaces/quickstart.yaml")
    raytrain.evaluate(run_id)
    raytrain.compare(["sweep-a", "sweep-b"])
    raytrain.export(run_id, "my-model")

Nothing heavy is imported until one of these names is used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raytrain.api import TrainResult as TrainResult
    from raytrain.api import train as train
    from raytrain.config import RunConfig as RunConfig
    from raytrain.examine import EvalResult as EvalResult
    from raytrain.examine import evaluate as evaluate
    from raytrain.exports.leave import ExportResult as ExportResult
    from raytrain.exports.leave import export as export
    from raytrain.exports.tensors import load_exported as load_exported
    from raytrain.report.compare import Comparison as Comparison
    from raytrain.report.compare import compare as compare
    from raytrain.spaces.space import SearchSpace as SearchSpace
    from raytrain.sweep.engine import TuneResult as TuneResult
    from raytrain.sweep.engine import tune as tune
    from raytrain.types import RequestError as RequestError
    from raytrain.types import TrainingFailed as TrainingFailed

_HOMES = {
    "train": "raytrain.api",
    "evaluate": "raytrain.examine",
    "TrainResult": "raytrain.api",
    "EvalResult": "raytrain.examine",
    "tune": "raytrain.sweep.engine",
    "TuneResult": "raytrain.sweep.engine",
    "compare": "raytrain.report.compare",
    "Comparison": "raytrain.report.compare",
    "SearchSpace": "raytrain.spaces.space",
    "RunConfig": "raytrain.config",
    "export": "raytrain.exports.leave",
    "load_exported": "raytrain.exports.tensors",
    "ExportResult": "raytrain.exports.leave",
    "RequestError": "raytrain.types",
    "TrainingFailed": "raytrain.types",
}

__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'raytrain' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
