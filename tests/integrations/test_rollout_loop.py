"""The loop: a trainer, and a rollout engine in a process of its own, joined by files."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import tiny_llama
from test_weight_delta import Run

from grass_hf.integrations.rollouts.files import SyncWriter

SCRIPT = Path(__file__).parents[1] / "distributed" / "scripts" / "rollout_replica.py"


@pytest.mark.parametrize("steps", [15, pytest.param(200, marks=pytest.mark.slow)])
def test_a_rollout_engine_follows_a_trainer(tmp_path, steps):
    run = Run(lambda: tiny_llama(tie_word_embeddings=True), update_interval=7)
    run.model.save_pretrained(tmp_path / "model")
    (tmp_path / "answers").mkdir()
    words = [SCRIPT, tmp_path / "model", tmp_path / "sync", tmp_path / "answers", steps]
    command = [sys.executable, *map(str, words)]
    writer = SyncWriter(run.delta, tmp_path / "sync")
    prompt = torch.arange(12).view(2, 6)
    engine = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        for step in range(1, steps + 1):
            run.step()
            writer.write()
            if step == steps // 2:
                engine.kill()  # and the synchronisations of a few steps pass it by
                engine.wait()
            if step == steps // 2 + 3:
                engine = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
            if not steps // 2 <= step < steps // 2 + 3:
                answer = torch.load(_awaited(tmp_path / "answers" / f"{step}.pt", engine))
                run.model.eval()
                with torch.no_grad():
                    expected = run.model(prompt).logits
                    tokens = run.model.generate(prompt, max_new_tokens=3, do_sample=False)
                run.model.train()
                assert torch.equal(answer["logits"], expected), step
                assert torch.equal(answer["tokens"], tokens) and answer["step"] == step
        assert engine.wait(timeout=60) == 0
    finally:
        engine.kill()
        engine.wait()


def _awaited(path: Path, engine: subprocess.Popen) -> Path:
    until = time.monotonic() + 120
    while not path.exists():
        assert engine.poll() in (None, 0), engine.stderr.read()[-2000:]
        assert time.monotonic() < until, f"{path.name} did not come"
        time.sleep(0.002)
    return path
