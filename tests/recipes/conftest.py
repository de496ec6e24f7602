"""What tests of recipes and studies share."""

import json

import pytest
from helpers import tiny_llama

from grass_hf.measure.bench.methods import KINDS


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    """A study of a few seconds over a tiny model and text of our own."""
    folder = tmp_path_factory.mktemp("study")
    words = [f"word{n % 7} and word{n % 5} of line {n}. " * 12 for n in range(24)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in words))
    tiny_llama(vocab_size=300, max_position_embeddings=64).config.save_pretrained(folder)
    return {
        "model": {"config_name": str(folder / "config.json"), "tokenizer_vocab_size": 300},
        "data": {"dataset": str(folder / "text.jsonl"), "sequence_length": 16, "holdout": 4},
        "training": {"max_steps": 6, "per_device_train_batch_size": 2, "use_cpu": True},
        "study": {
            "rank": 4,
            "seeds": [0],
            "evaluations": 3,
            "eval_blocks": 8,
            "grid": {"learning_rates": [0.01], "multipliers": [0.5]},
            "methods": {kind: None for kind in KINDS},
        },
    }
