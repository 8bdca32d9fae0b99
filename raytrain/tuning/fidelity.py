"""Unit of trial length, so that methods of different cost are compared at equal cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from raytrain.config.run import RunConfig


@dataclass(frozen=True)
class Fidelity:
    """Forward-equivalents per training image where runs are measured in them, else epochs."""

    by_cost: bool
    length: float  # of a whole run, in this unit
    num_images: int  # training images, over all workers

    @classmethod
    def of(cls, run: RunConfig, num_images: int) -> Fidelity:
        """The unit of a sweep over `run`."""
        if run.fe_per_image is None:
            return cls(False, float(run.epochs), num_images)
        return cls(True, run.fe_per_image, num_images)

    @property
    def unit(self) -> str:
        """For people."""
        return "FE/image" if self.by_cost else "epochs"

    def step(self, metrics: Mapping[str, float], epoch: int) -> int:
        """How far a trial had come at this row: the whole number that pruners compare at."""
        return round(self.fe_per_image(metrics)) if self.by_cost else epoch

    def fe_per_image(self, metrics: Mapping[str, float]) -> float:
        """What a trial had cost by this row."""
        return metrics.get("cost/fe", 0.0) / self.num_images
