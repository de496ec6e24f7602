"""Test only: lets accelerate shard over gloo on the CPU, which it refuses for want of a GPU; then runs a script.

cpu_fsdp.py SCRIPT ARGS... under `accelerate launch` with an FSDP config and ACCELERATE_TORCH_DEVICE=cpu.
"""

import os
import runpy
import sys

from accelerate.state import PartialState
from accelerate.utils import DistributedType

if "LOCAL_RANK" in os.environ:
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
    runpy.run_path(sys.argv[0], run_name="__main__")
