"""Train all of LLaMA-7B in the memory of a small machine: `make proof-7b`.

Random bfloat16 weights, the State of the Union speeches in the 32,000 pieces of mistral-common's tokenizer, a few steps
with rows selected anew in between; then the checkpoint is written and read again shard by shard. What is never there:
a second copy of the weights, a full gradient, a full optimizer state.

    proof_7b.py [--config configs/llama_7b.json] [--steps 6] [--tokens 256] [--rank 256] ... (--help)
"""

from pathlib import Path

from proving import Way, prove, small_machine_parser

from grass_hf import restore_model

DEFAULTS = {
    "config": "configs/llama_7b.json",
    "steps": 6,
    "tokens": 256,
    "rank": 256,
    "interval": 3,
    "lr": 2e-4,
    "budget": 18.5,
    "output": Path("runs/proof_7b"),
}
WAY = Way(
    settings={"target_modules": "all-matrices", "resident": False},
    end=lambda model, optimizer: restore_model(model),
    save=lambda model, folder: model.save_pretrained(folder, max_shard_size="500MB"),
)

if __name__ == "__main__":
    prove(small_machine_parser(__doc__, **DEFAULTS).parse_args(), WAY)
