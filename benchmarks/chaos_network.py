"""The network that `chaos.py` trains: small, slow, and it records every step that it takes part in.

Attacks see it in evaluation mode, so that a step has one pass in training mode, that of the update.

A record is written before the step, in one call of the system: it stays when the process is killed.
"""

from __future__ import annotations

import os
import struct
import time
import zlib
from pathlib import Path

import torch
from torch import Tensor, nn

FOLDER = (
    "CHAOS_STEPS"  # environment variable: the folder of the records; without it there are none
)
_RECORD = struct.Struct("<dIH")
_SECONDS = 0.08  # of a pass in training, that an epoch lasts some seconds on any machine


class Recording(nn.Module):
    """Two layers; a pass in training mode records when it was, a checksum of its images, and their number."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first = nn.Linear(64, 32)
        self.last = nn.Linear(32, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) > 3 and FOLDER in os.environ:
            _record(x)
            time.sleep(_SECONDS)
        return self.last(torch.relu(self.first(x.flatten(1))))


def _record(x: Tensor) -> None:
    world = torch.distributed
    rank = world.get_rank() if world.is_available() and world.is_initialized() else 0
    line = _RECORD.pack(time.time(), zlib.crc32(x.detach().numpy().tobytes()), len(x))
    with (Path(os.environ[FOLDER]) / f"{rank}.{os.getpid()}").open("ab", buffering=0) as file:
        file.write(line)


Pass = tuple[float, int, int]
"""When it was, the checksum of its images, their number."""


def passes(folder: Path) -> list[list[Pass]]:
    """What each process of rank 0 has recorded, the earliest first."""
    found = [list(_RECORD.iter_unpack(file.read_bytes())) for file in folder.glob("0.*")]
    return sorted(found, key=lambda process: process[0][0])


def images(folder: Path) -> int:
    """How many images all processes have had in all passes."""
    files = folder.iterdir()
    return sum(one[2] for file in files for one in _RECORD.iter_unpack(file.read_bytes()))
