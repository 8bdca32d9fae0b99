"""MLflow, written by one thread of the driver from a file, so that training never waits for it.

A sweep is a parent run and its trials are the children; a single training is a run of its own.
Workers never import mlflow. From the bottom up: `book` (what a file says about its runs), `spool`
(the file), `stores` (MLflow), `delivery` (from one to the other), `tracker` (what the commands use).
What the UI makes of it: `experiment`, `views`, `notes`, `inputs`, `registry`.
"""

from raytrain.tracking.book import Status
from raytrain.tracking.registry import Entry
from raytrain.tracking.stores import fetch, finished_runs, reader, tracking_uri
from raytrain.tracking.tracker import Tracker, tracked
from raytrain.tracking.views import View, link

__all__ = [
    "Entry",
    "Status",
    "Tracker",
    "View",
    "fetch",
    "finished_runs",
    "link",
    "reader",
    "tracked",
    "tracking_uri",
]
