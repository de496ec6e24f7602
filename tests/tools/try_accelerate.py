"""A loop of one's own over accelerate, by `accelerate launch`: accumulation, clipping, a checkpoint, plain files."""

import json
import sys
from pathlib import Path

from checks import assert_driven, weights
from shared import DENSITY, chats, run, script, tiny_llama

MODEL = Path("model")


def train() -> None:
    import torch
    from accelerate import Accelerator
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from grass_hf import GrassConfig, convert_to_grass, grass_optimizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    rows = [json.loads(line)["messages"] for line in chats(Path("chats.jsonl"), 8).read_text().splitlines()]
    texts = tokenizer.apply_chat_template(rows, tokenize=False)
    data = [{key: value[0] for key, value in tokenizer(text, return_tensors="pt").items()} for text in texts]

    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = AutoModelForCausalLM.from_pretrained(MODEL).train()
    convert_to_grass(model, GrassConfig(density=DENSITY, update_interval=200))
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-2, weight_decay=0.0)
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch, labels=batch["input_ids"]).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert optimizer.optimizer.grass.metrics()["grass/coverage"] > 0
    accelerator.save_state("state")
    trained = {name: weight.clone() for name, weight in model.state_dict().items()}
    for weight in model.state_dict().values():
        weight.zero_()
    accelerator.load_state("state")
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, trained[name]), f"{name} is another one after load_state"
    accelerator.unwrap_model(model).save_pretrained("out")


if sys.argv[1:] == ["train"]:
    train()
else:
    tiny_llama(MODEL)
    run([script("accelerate"), "launch", "--cpu", "--num_processes", "1", __file__, "train"])
    assert_driven(weights(MODEL), weights(Path("out")))
