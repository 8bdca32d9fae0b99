"""A recorder on any device, which refuses what a CUDA graph cannot hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from raytrain.core.errors import NotReplayable
from raytrain.core.recording import Replay, Result

_HOST_READS = frozenset(
    {
        "aten::_local_scalar_dense",  # .item(), float(), if
        "aten::equal",
        "aten::is_nonzero",
        "aten::nonzero",
        "aten::masked_select",
        "aten::unique_dim",
        "aten::_unique2",
        "aten::lift_fresh",  # torch.tensor(...): a copy from the host
    }
)


class RecordedOperations:
    """Records operations on tensors; a replay runs them again on the same memory.

    As in a CUDA graph, numbers and addresses are the recorded ones, and nothing of Python
    runs again. Operations that read a tensor on the host, or whose shape depends on values, are refused.
    """

    def run(self, work: Callable[[], Result]) -> Result:
        """Do work."""
        return work()

    def record(self, work: Callable[[], Result]) -> tuple[Replay, Result]:
        """Do work and record it.

        Raises:
            NotReplayable: naming an operation that a CUDA graph cannot hold.
        """
        recorded = _Recording()
        with recorded:
            result = work()
        return recorded.replay, result


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name in _HOST_READS or _by_mask(func, args):
            raise NotReplayable(f"{func} reads a tensor on the host")
        given = _aliases((args, kwargs))  # operations such as squeeze_ change the tensor itself
        found = func(*args, **kwargs)
        self._calls.append((func, *given, _aliases(found)))
        return found

    def replay(self) -> None:
        """Run the operations again; their results take the places of the recorded ones."""
        with torch.no_grad():
            for func, args, kwargs, recorded in self._calls:
                again = func(*args, **kwargs)
                for old, new in zip(_of(recorded), _of(again), strict=True):
                    if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                        old.copy_(new)


def _by_mask(func: Any, args: Any) -> bool:
    """Whether a tensor is indexed by a mask, so that the shape depends on its values."""
    if func._schema.name not in ("aten::index", "aten::index_put", "aten::index_put_"):
        return False
    return any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1])


def _aliases(value: Any) -> Any:
    """Other tensors in place of those in `value`, with the same memory."""
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, value)


def _of(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
