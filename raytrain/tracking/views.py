"""Pages of the MLflow UI that are set up already: columns, search and charts, behind a link.

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
NAME_WIDTH = 200  # pixels of the column of names

_LONGEST = 5000  # characters of a tag of an experiment
_LONGEST_KEY = 200  # of the part of its key that is a view's own


@dataclass(frozen=True)
class View:
    """What a page shows. `columns` are `metrics.NAME`, `params.NAME` or `tags.NAME`.

    Metrics of `curves` are the first charts; what is spent and histograms are folded, at the end.
    """

    columns: Sequence[str]
    params: Sequence[str]  # axes of the parallel coordinates, in this order
    metrics: Sequence[str]  # the axes after them; the last one colours the lines
    search: str = ""
    order: str = ""  # a column: rows and charts begin with its best; default: the newest run
    down: bool = True  # from its largest value
    curves: Sequence[str] = ()  # metrics over epochs, the first charts
    name_width: int = NAME_WIDTH  # pixels of the column of names

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
        widths = {_NAME: self.name_width, **{_column(name): width(name) for name in self.columns}}
        return {
            "searchFilter": self.search,
            **(order if self.order else {}),
            "selectedColumns": [_column(name) for name in self.columns],
            "columnOrder": list(widths),
            "columnWidths": widths,
            "runsHiddenMode": "SHOW_ALL",
            "isAccordionReordered": True,  # the sections stay in this order
            "compareRunSections": [_section(*one) for one in _SECTIONS],
            "compareRunCharts": [
                *(_curve(number, metric) for number, metric in enumerate(self.curves)),
                {
                    **_chart("PARALLEL", "parallel", _CONFIGURATIONS),
                    "runsCountToCompare": 500,
                    "showAllRuns": True,
                    "selectedParams": list(self.params),
                    "selectedMetrics": list(self.metrics),
                },
            ],
        }


_NAME = "attributes.`Run Name`"
_CURVES, _CONFIGURATIONS = "Curves", "Configurations"
_SECTIONS = (  # name, charts in a row, whether it is unfolded; MLflow puts metrics into those of their prefix
    (_CURVES, 3, True),
    (_CONFIGURATIONS, 1, True),
    ("valid", 3, True),
    ("train", 3, True),
    ("sentinel", 3, False),
    ("cost", 3, False),
    ("fosc_histogram", 3, False),
)

ROOM = 980  # pixels for names and columns in a window of 1400 with the side bar
_WIDEST, _NARROWEST = 132, 56  # pixels of a column


def width(column: str) -> int:
    """The pixels of a column whose heading can be read, if it is not too long."""
    _, _, name = column.partition(".")
    return max(_NARROWEST, min(_WIDEST, 26 + 7 * len(name)))


def fitting(
    columns: Sequence[str], taken: Sequence[str], name_width: int = NAME_WIDTH
) -> list[str]:
    """The first of the columns that there is room for beside those in `taken`."""
    left = ROOM - name_width - sum(map(width, taken))
    found: list[str] = []
    for column in columns:
        left -= width(column)
        if left < 0:
            break
        found.append(column)
    return found


def _section(name: str, columns: int, unfolded: bool) -> dict[str, Any]:
    return {
        "uuid": name,
        "name": name,
        "columns": columns,
        "cardHeight": 420 if columns == 1 else 330,
        "display": unfolded,
        "isReordered": False,
        "deleted": False,
        "isGenerated": False,
    }


def _chart(kind: str, uuid: str, section: str) -> dict[str, Any]:
    return {
        "type": kind,
        "uuid": uuid,
        "metricSectionId": section,
        "deleted": False,
        "isGenerated": False,
    }


def _curve(number: int, metric: str) -> dict[str, Any]:
    """A metric over epochs, with all fields of a chart made in the UI."""
    return {
        **_chart("LINE", f"curve{number}", _CURVES),
        "metricKey": metric,
        "displayName": metric,
        "lineSmoothness": 0,
        "scaleType": "linear",
        "xAxisScaleType": "linear",
        "range": {},
        "xAxisKey": "step",
        "selectedXAxisMetricKey": "",
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "ignoreOutliers": False,
        "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True,
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
    """Where the UI shows a view, as a link from any of its pages; the side bar is that of training."""
    mode = "&compareRunsMode=CHART" if charts else ""
    return f"#/experiments/{experiment_id}/runs?viewStateShareKey={key_of(name)}{mode}&{_TRAINING}"


def run_link(experiment_id: str, run_id: str) -> str:
    """Where the UI shows a run, as a link from any of its pages."""
    return f"#/experiments/{experiment_id}/runs/{run_id}?{_TRAINING}"


_TRAINING = "workflowType=machine_learning"  # and not generative AI, which MLflow shows otherwise
