"""What all tests share: one thread, so that results do not depend on the machine."""

import torch

from raytrain.core.distributed_context import keep_freed_memory

torch.set_num_threads(1)
keep_freed_memory()
