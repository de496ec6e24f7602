"""A rollout engine: follows a folder of synchronisations, and answers each with the logits of its model.

rollout_replica.py MODEL SYNC ANSWERS LAST      tests/test_rollout_loop.py starts it, kills it and starts it again
"""

import os
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / "support"), str(Path(__file__).parents[3])]

import torch
from transformers import AutoModelForCausalLM

from grass_hf.integrations.rollouts.replica import Replica

folder, sync, answers, last = sys.argv[1:]
torch.set_num_threads(1)
# as the trainer was cast, its positions with it
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(torch.bfloat16).eval()
replica = Replica(sync)
prompt = torch.arange(12).view(2, 6)
while replica.sequence < int(last):
    if replica.catch_up(model.state_dict()):
        with torch.no_grad():
            logits = model(prompt).logits
            tokens = model.generate(prompt, max_new_tokens=3, do_sample=False)
        partial = f"{answers}/{replica.sequence}.part"
        torch.save({"logits": logits, "tokens": tokens, "step": replica.step}, partial)
        os.replace(partial, f"{answers}/{replica.sequence}.pt")
    else:
        time.sleep(0.002)
