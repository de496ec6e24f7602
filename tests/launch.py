"""Several processes over gloo on this machine, and what they said."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parent / "scripts"


def torchrun(processes: int, script: str, *arguments: str, timeout: int = 400, **environment: str):
    """Run one of tests/scripts under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", str(SCRIPTS / script), *arguments]
    return _run(command, timeout, environment)


def accelerate_launch(
    config: Path,
    script: str,
    *arguments: str,
    port: str = "",
    options: list[str] = (),
    timeout: int = 400,
    **environment: str,
):
    """Run one of tests/scripts under ``accelerate launch`` with a config file, on the CPU."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), *options]
    command += ["--main_process_port", port or str(random.randint(20000, 40000)), str(SCRIPTS / script), *arguments]
    return _run(command, timeout, {"ACCELERATE_TORCH_DEVICE": "cpu", **environment})


def _run(command: list[str], timeout: int, environment: dict[str, str]) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout)
