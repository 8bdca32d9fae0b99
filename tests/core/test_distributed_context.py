"""What a process does where it runs."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from raytrain.core.distributed_context import local_context

if sys.argv[1] == "kept":
    local_context("cpu")
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2**24)  # 64 MiB: more than glibc keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
torch.ones(2**24)
print(faults())
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_memory_that_was_freed_is_used_again_without_asking_the_system() -> None:
    def faults(word: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", FAULTS, word], capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    left_alone, kept = faults("alone"), faults("kept")
    assert kept < left_alone / 4
