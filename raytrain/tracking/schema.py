"""MLflow's tables, made or completed by one process at a time and in one transaction.

MLflow creates missing tables itself, but in a transaction for every step and without a lock:
processes that start together interfere, and a killed one may leave tables that cannot be completed.
Here one process at a time works under the database's lock, and a kill rolls everything back.
"""

from __future__ import annotations

import time
from typing import Any

from raytrain.tracking.address import artifacts_beside, sqlite_file

_ALONE = {  # until the transaction ends; of MySQL, which ends one at every table: the connection
    "sqlite": "BEGIN EXCLUSIVE",
    "postgresql": "SELECT pg_advisory_xact_lock(7273747201)",
    "mysql": "SELECT GET_LOCK('raytrain', 120)",
}
_WAIT = "PRAGMA busy_timeout = 120000"  # milliseconds, while another process works


def make_tables(uri: str) -> None:
    """Make what is missing of the tables of a database, its folder and its first experiment.

    Raises:
        Exception: SQLAlchemy's, alembic's or that of a driver; nothing has changed.
    """
    from mlflow.store.db import utils

    file = sqlite_file(uri)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
    engine = utils.create_sqlalchemy_engine(uri)
    try:
        with engine.connect() as connection:
            if file is not None:
                connection.exec_driver_sql(_WAIT)
            if utils._all_tables_exist(connection):
                return
            connection.rollback()
            if engine.dialect.name in _ALONE:
                connection.exec_driver_sql(_ALONE[engine.dialect.name])
            if not utils._all_tables_exist(connection):
                _upgrade(connection, uri)
                if file is not None:
                    _make_first_experiment(connection, artifacts_beside(file))
                connection.commit()
    finally:
        engine.dispose()


def _upgrade(connection: Any, uri: str) -> None:
    """As MLflow does it, within the transaction of a connection."""
    from alembic.runtime.environment import EnvironmentContext
    from alembic.script import ScriptDirectory
    from mlflow.store.db import utils
    from mlflow.store.db.base_sql_model import Base
    from mlflow.store.tracking.dbmodels.initial_models import Base as InitialBase

    InitialBase.metadata.create_all(connection)
    config = utils._get_alembic_config(uri)
    script = ScriptDirectory.from_config(config)
    # MLflow's own environment would open a connection, and so a transaction, of its own.
    with EnvironmentContext(
        config, script, fn=lambda revision, _: script._upgrade_revs("heads", revision)
    ) as environment:
        environment.configure(
            connection=connection, target_metadata=Base.metadata, render_as_batch=True
        )
        environment.run_migrations()


def _make_first_experiment(connection: Any, artifacts: str) -> None:
    """The experiment that MLflow makes unasked, whose artifacts it would put where the command runs."""
    from mlflow.entities import Experiment, LifecycleStage
    from mlflow.store.tracking.dbmodels.models import SqlExperiment
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from mlflow.utils.workspace_utils import DEFAULT_WORKSPACE_NAME
    from sqlalchemy import insert, select

    number = int(SqlAlchemyStore.DEFAULT_EXPERIMENT_ID)
    its_id = SqlExperiment.experiment_id
    if connection.execute(select(its_id).where(its_id == number)).first() is not None:
        return
    now = int(time.time() * 1000)
    connection.execute(
        insert(SqlExperiment).values(
            experiment_id=number,
            name=Experiment.DEFAULT_EXPERIMENT_NAME,
            artifact_location=f"{artifacts}/{number}",
            lifecycle_stage=LifecycleStage.ACTIVE,
            creation_time=now,
            last_update_time=now,
            workspace=DEFAULT_WORKSPACE_NAME,
        )
    )
