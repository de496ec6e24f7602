"""Several processes over gloo on this machine, and what each of them said.

The launchers send every rank's standard error to a file of its own, because what they print of a failure is a table of
exit codes. `well` shows the ranks' last words, and which rank the launcher saw fail first.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

SCRIPTS = Path(__file__).parents[1] / "distributed" / "scripts"
# characters of a rank's last words
_SHOWN = 2500


def torchrun(processes: int, script: str, *arguments: str, options: list[str] = (), timeout: int = 400, **environment):
    """Run one of tests/distributed/scripts under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", *options]
    return _run(command, [str(SCRIPTS / script), *arguments], timeout, environment)


def accelerate_launch(
    config: Path,
    script: str,
    *arguments: str,
    port: str = "",
    options: list[str] = (),
    timeout: int = 400,
    **environment: str,
):
    """Run one of tests/distributed/scripts under ``accelerate launch`` with a config file, on the CPU."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), *options]
    command += ["--main_process_port", port or str(random.randint(20000, 40000))]
    environment = {"ACCELERATE_TORCH_DEVICE": "cpu", **environment}
    return _run(command, [str(SCRIPTS / script), *arguments], timeout, environment)


def well(done: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    """A run that must have ended well.

    Raises:
        AssertionError: it has not; with what its ranks said last.
    """
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-1000:]}\n{done.stderr}"
    return done


def _run(
    command: list[str], script: list[str], timeout: int, environment: dict[str, str]
) -> subprocess.CompletedProcess:
    """Run it; ``stderr`` of what is returned is every rank's last words and the launcher's."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", **environment}
    env.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")  # torch repeats some until nothing else is left to see
    with tempfile.TemporaryDirectory(prefix="ranks") as folder:
        command = [*command, "--tee", "2", "--log_dir", folder, *script]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        try:
            said, launcher = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # one that is killed leaves its ranks behind
            said, launcher = process.communicate(timeout=60)
            launcher += f"\nstopped after {timeout} s"  # and its exit code is not 0
        errors = [f"-- rank {path.parent.name}:\n{path.read_text()[-_SHOWN:]}" for path in _logs(folder)]
    own = "\n".join(line for line in launcher.splitlines() if not line.startswith("[default"))
    return subprocess.CompletedProcess(command, process.returncode, said, "\n".join([*errors, "-- launcher:", own]))


def _logs(folder: str) -> list[Path]:
    return sorted(Path(folder).rglob("stderr.log"))
