"""Lightning's Trainer.fit: automatic optimisation, whose step has a closure, and manual; a checkpoint and resume."""

import json
from pathlib import Path

import lightning
import rich
import torch
from checks import assert_driven, weights
from lightning.pytorch.loggers import CSVLogger
from shared import DENSITY, chats, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer
from grass_hf.integrations.start_table import render, start_report

folder = tiny_llama(Path("model"))
tokenizer = AutoTokenizer.from_pretrained(folder)
# one batch, so that each step is an epoch: Lightning begins an interrupted one anew
rows = [json.loads(line)["messages"] for line in chats(Path("chats.jsonl"), 4).read_text().splitlines()]
texts = tokenizer.apply_chat_template(rows, tokenize=False)
data = [{key: value[0] for key, value in tokenizer(text, return_tensors="pt").items()} for text in texts]
loader = torch.utils.data.DataLoader(data, batch_size=4)


class Automatic(lightning.LightningModule):
    def configure_model(self):
        if not hasattr(self, "model"):
            self.model = AutoModelForCausalLM.from_pretrained(folder)
            convert_to_grass(self.model, GrassConfig(density=DENSITY, update_interval=200))

    def configure_optimizers(self):
        return grass_optimizer(self.model, torch.optim.AdamW, lr=1e-2, weight_decay=0.0)

    def on_train_start(self):
        rich.print(render(start_report(self.model, self.optimizers(use_pl_optimizer=False))))

    def loss(self, batch):
        return self.model(**batch, labels=batch["input_ids"]).loss

    def training_step(self, batch, _):
        return self.loss(batch)

    def on_train_batch_end(self, *_):
        self.log_dict(self.optimizers(use_pl_optimizer=False).grass.metrics())


class Manual(Automatic):
    automatic_optimization = False

    def training_step(self, batch, _):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


def fit(kind: type, steps: int, name: str, **resume) -> dict:
    """Train, and give the weights that `save_pretrained` writes."""
    module = kind()
    logger = CSVLogger(".", name=name, version="log")
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=logger, log_every_n_steps=1, enable_progress_bar=False
    )
    trainer.fit(module, loader, **resume)
    metrics = Path(logger.log_dir, "metrics.csv").read_text()
    assert "grass/coverage" in metrics, metrics
    module.model.save_pretrained(name)
    return weights(Path(name))


before = weights(folder)
straight = fit(Automatic, 2, "automatic")
assert_driven(before, straight)
assert_driven(before, fit(Manual, 2, "manual"))

fit(Automatic, 1, "half")
checkpoint = next(Path("half").rglob("*.ckpt"))
saved = torch.load(checkpoint, weights_only=True)["state_dict"]
plain = {f"model.{name}" for name in AutoModelForCausalLM.from_pretrained(folder).state_dict()}
assert saved.keys() == plain, f"the checkpoint has {sorted(saved.keys() ^ plain)[:4]} beside plain keys"
resumed = fit(Automatic, 2, "resumed", ckpt_path=checkpoint)
for name, weight in straight.items():
    assert torch.equal(weight, resumed[name]), f"{name} is another one after a resume"
print("the checkpoint has plain keys, and resumes exactly", flush=True)
