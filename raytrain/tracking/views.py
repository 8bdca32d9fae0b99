"""Pages of the MLflow UI that are set up already: columns, search and a chart, behind a link.

MLflow keeps the state of a shared page as a tag of the experiment; such tags are made
here. Its parallel coordinates are drawn over exactly the parameters and metrics of a view.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

TAG = "mlflow.sharedViewState."
EVERY = "raytrain"
"""The view that every experiment has."""

_LONGEST = 5000  # characters of a tag of an experiment
_LONGEST_KEY = 200  # of the part of its key that is a view's own


@dataclass(frozen=True)
class View:
    """What a page shows. `columns` are `metrics.NAME`, `params.NAME` or `tags.NAME`."""

    columns: Sequence[str]
    params: Sequence[str]  # axes of the parallel coordinates, in this order
    metrics: Sequence[str]  # the axes after them; the last one colours the lines
    search: str = ""
    order: str = ""  # a column: rows and charts begin with its best; default: the newest run
    down: bool = True  # from its largest value

    def state(self) -> str:
        """As MLflow keeps it: deflated JSON.

        Raises:
            ValueError: if it is longer than a tag may be.
        """
        text = json.dumps(self._page(), separators=(",", ":"))
        packed = "deflate;" + base64.b64encode(zlib.compress(text.encode(), 9)).decode()
        if len(packed) > _LONGEST:
            raise ValueError(f"a view of {len(packed)} characters; MLflow keeps {_LONGEST}")
        return packed

    def _page(self) -> dict[str, Any]:
        order = {"orderByKey": _column(self.order), "orderByAsc": not self.down}
        return {
            "searchFilter": self.search,
            **(order if self.order else {}),
            "selectedColumns": [_column(name) for name in self.columns],
            "runsHiddenMode": "SHOW_ALL",
            "compareRunSections": [_SECTION],
            "compareRunCharts": [
                {
                    "type": "PARALLEL",
                    "uuid": "parallel",
                    "metricSectionId": _SECTION["uuid"],
                    "deleted": False,
                    "isGenerated": False,
                    "runsCountToCompare": 500,
                    "showAllRuns": True,
                    "selectedParams": list(self.params),
                    "selectedMetrics": list(self.metrics),
                }
            ],
        }


_SECTION = {
    "uuid": "configurations",
    "name": "Configurations",
    "columns": 1,
    "cardHeight": 420,
    "display": True,
    "isReordered": False,
    "deleted": False,
    "isGenerated": False,
}


def _column(name: str) -> str:
    kind, _, rest = name.partition(".")
    return f"{kind}.`{rest}`"


def key_of(name: str) -> str:
    """The name of a view as a part of a tag's key and of an address.

    >>> key_of("quickstart-20261121"), key_of("try #7")
    ('quickstart-20261121', 'try--7-4dd8860f')
    """
    kept = re.sub(r"[^A-Za-z0-9_.-]", "-", name)
    if kept == name and len(name) <= _LONGEST_KEY:
        return name
    return f"{kept[: _LONGEST_KEY - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def link(experiment_id: str, name: str, charts: bool = False) -> str:
    """Where the UI shows a view, as a link from any of its pages."""
    mode = "&compareRunsMode=CHART" if charts else ""
    return f"#/experiments/{experiment_id}/runs?viewStateShareKey={key_of(name)}{mode}"
