"""`raytrain ui`: a page of the MLflow UI, and its server."""

from __future__ import annotations

import os
import sys

import typer

from raytrain.cli.common import full_link, is_server
from raytrain.core.signals import EXIT_STATUS, interruptible
from raytrain.tracking import HOST, check_port, reader, serving, tracking_uri
from raytrain.tracking.pages import page_of


def show_ui(uri: str | None, name: str | None, port: int, browser: bool) -> None:
    """Print the link of a page and open it; serve the store until a signal, if it is a database.

    Raises:
        RequestError: if the port is in use, the name means nothing, or the store cannot be used.
        RuntimeError: if the server does not answer.
    """
    store = tracking_uri(uri)
    if is_server(store):
        _show(full_link(store, page_of(reader(store), name)), browser)
        return
    check_port(port)  # before the database is read, which takes seconds
    page = page_of(reader(store), name)
    try:
        with interruptible(), serving(store, port) as server:
            _show(full_link(f"http://{HOST}:{port}", page), browser)
            typer.echo(f"serving {store}; Ctrl-C ends it")
            status = server.wait()
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_STATUS) from None
    raise typer.Exit(int(status != 0))


def _show(address: str, browser: bool) -> None:
    typer.echo(address)
    if browser and somebody_sits_here():
        typer.launch(address)


def somebody_sits_here() -> bool:
    """Whether a browser that is opened would be seen: on a terminal, with a display on Linux."""
    display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return sys.stdout.isatty() and (sys.platform != "linux" or bool(display))
