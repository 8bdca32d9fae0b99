"""What a process does where it runs."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from helpers import batch_of, state_of, tiny_net

from raytrain.algorithms import SiHg
from raytrain.core.distributed_context import DistributedContext
from raytrain.testing.algorithms import built

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
for _ in range(10):  # until the heap has the size that it keeps
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
    assert kept < left_alone / 20


def test_averaged_gradients_lie_in_memory_as_the_weights_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dist, "all_reduce", lambda values: values.mul_(2))
    model = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    weight = model.weight
    model(torch.rand(2, 3, 8, 8)).square().sum().backward()
    assert weight.grad is not None
    before = weight.grad.clone()
    DistributedContext(world=2).average_grads(model)
    assert torch.equal(weight.grad, before) and weight.grad.stride() == weight.stride()


def test_gradients_of_a_table_lie_in_memory_as_the_weights_do() -> None:
    algorithm, model = built(SiHg(mode="T")), tiny_net().to(memory_format=torch.channels_last)
    state = state_of(model, algorithm)
    algorithm.step(state, batch_of(8))
    for weight in model.parameters():
        assert weight.grad is not None and weight.grad.stride() == weight.stride()
