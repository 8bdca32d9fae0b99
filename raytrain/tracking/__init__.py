"""MLflow, written by one thread of the driver from a file, so that training never waits for it.

A sweep is a parent run and its trials are the children; a single training is a run of its own.
Workers never import mlflow. From the bottom up: `outbox_state` (the runs in a file),
`outbox` (the file), `address` (which store is meant), `schema` (its tables), `stores` (MLflow),
`delivery` (from an outbox to a store), `tracker` (what the commands use), `store_check` (whether a
store can be used, without changing it). For the UI: `experiment`, `views`, `notes`, `mlflow_inputs`,
`registry`; its server: `ui`.
"""

from raytrain.tracking.address import sqlite_file, sqlite_uri, tracking_uri
from raytrain.tracking.outbox_state import Status
from raytrain.tracking.registry import Entry
from raytrain.tracking.stores import fetch, finished_runs, reader
from raytrain.tracking.tracker import Tracker, tracked
from raytrain.tracking.ui import HOST, check_port, serving, ui_server
from raytrain.tracking.views import View, fitting, link, run_link

__all__ = [
    "HOST",
    "Entry",
    "Status",
    "Tracker",
    "View",
    "check_port",
    "fetch",
    "finished_runs",
    "fitting",
    "link",
    "reader",
    "run_link",
    "serving",
    "sqlite_file",
    "sqlite_uri",
    "tracked",
    "tracking_uri",
    "ui_server",
]
