"""Settings that change how fast a run is, and its results by rounding only."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from raytrain.core.types import Spec

Mode = Literal["eager", "graph", "compile"]


class Performance(Spec):
    """How the passes and steps of training are executed.

    `eager` launches operations one by one. `graph` records a step as a CUDA graph and replays it.
    `compile` compiles the network's passes by torch.compile, which takes 10 to 60 seconds the first time
    on a machine, and on a GPU records the step too. `auto` chooses by device, network and length of the
    run, never by measured time: equal configurations run alike on equal machines.
    """

    bare: ClassVar[str | None] = "mode"

    mode: Annotated[
        Literal["auto", "eager", "graph", "compile"],
        Field(description="how steps are executed; graph needs a GPU"),
    ] = "auto"
    channels_last: Annotated[
        bool | None,
        Field(
            description="images and weights in memory with their channels last; default: unless the "
            "network is your own"
        ),
    ] = None
    tf32: Annotated[
        bool, Field(description="float32 products on a GPU with 10 bits of mantissa (TF32)")
    ] = True
