"""SentenceTransformerTrainer: in-batch negatives, an evaluation, the best model loaded at the end."""

import sys
from pathlib import Path

from checks import assert_driven, assert_logged, assert_table, history, weights
from shared import SETTINGS, WORDS, run, script, tiny_llama


def train() -> None:
    import datasets
    import torch
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, losses, models
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments

    words = models.Transformer(str(tiny_llama(Path("words"))))
    model = SentenceTransformer(modules=[words, models.Pooling(32, "mean")], device="cpu")
    model.save_pretrained("before")
    pairs = {"anchor": [f"the {w}" for w in WORDS[:8]], "positive": [f"what is the {w}" for w in WORDS[:8]]}
    data = datasets.Dataset.from_dict(pairs)
    arguments = Arguments(
        output_dir="out",
        optim="grass",
        optim_args=SETTINGS,
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        report_to="none",
        use_cpu=True,
    )
    loss = losses.MultipleNegativesRankingLoss(model)
    trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=data, eval_dataset=data, loss=loss)
    trainer.train()
    model.save_pretrained("after")
    best = Path(trainer.state.best_model_checkpoint)
    for name, weight in weights(best).items():
        assert torch.equal(weight, weights(Path("after"))[name]), f"{name} is not the best checkpoint's"
    assert model.encode(["the sky"]).shape == (1, 32)


if sys.argv[1:] == ["train"]:
    train()
else:
    said = run([script("grass-hf"), "run", __file__, "train"])
    assert_table(said)
    before = weights(Path("before"))
    assert_driven(before, weights(Path("after")))
    assert_driven(before, weights(Path("out/checkpoint-2")))
    assert_logged(history(Path("out")))
