"""MLflow, written by one thread of the driver from a file, so that training never waits for it.

A sweep is a parent run and its trials are the children; a single training is a run of its own.
Workers never import mlflow. From the bottom up: `book` (what a file says about its runs), `spool`
(the file), `stores` (MLflow), `delivery` (from one to the other), `tracker` (what the commands use).
"""

from raytrain.tracking.book import Status
from raytrain.tracking.stores import fetch, finished_runs, reader, tracking_uri
from raytrain.tracking.tracker import Tracker, tracked

__all__ = ["Status", "Tracker", "fetch", "finished_runs", "reader", "tracked", "tracking_uri"]
