"""Train all of LLaMA-13B in 20 GiB, its frozen weights in eight bits: `make proof-13b-int8`.

As `proof_7b.py`, but every weight of a linear layer is stored in int8 as soon as it has been made, so that the 26 GB of
the model in bfloat16 are never there. A few steps, with rows selected anew in between; then a plain bfloat16 checkpoint
is written shard by shard (`save_plain`), read again and quantised weight by weight, and gives the very same loss.

    proof_13b_int8.py [--config configs/llama_13b.json] [--steps 3] [--tokens 256] [--rank 128] ... (--help)
"""

from pathlib import Path

from proving import Way, in_int8, prove, small_machine_parser

from grass_hf import convert_to_grass, save_plain

DEFAULTS = {
    "config": "configs/llama_13b.json",
    "steps": 3,
    "tokens": 256,
    "rank": 128,
    "interval": 2,
    "lr": 2e-4,
    "budget": 20.0,
    "output": Path("runs/proof_13b_int8"),
}


WAY = Way(
    settings={"target_modules": "all-matrices", "weight_dtype": "int8"},
    end=lambda model, optimizer: optimizer.grass.settle(),
    save=lambda model, folder: save_plain(model, folder, max_shard_size=5 * 10**8),
    store=in_int8,
    load=convert_to_grass,
)

if __name__ == "__main__":
    prove(small_machine_parser(__doc__, **DEFAULTS).parse_args(), WAY)
