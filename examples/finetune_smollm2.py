"""Finetune SmolLM2-135M-Instruct, a real model, on everyday dialogues with the Hugging Face Trainer.

Nothing here knows about the optimizer, which is whatever `optim` and `optim_args` name. All matrices, the tied
embedding too, a quarter at a time:

    grass-hf run examples/finetune_smollm2.py --optim grass --optim_args "density=0.25,target_modules=all-matrices" \\
        --learning_rate 1e-4 --max_steps 30 --output_dir runs/smollm2 [--dtype bfloat16]

The model and the dialogues come from pip packages, see smollm2.py. Leaves a plain checkpoint in `output_dir`.
"""

from dataclasses import dataclass, field

import smollm2
import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, HfArgumentParser, Trainer, TrainingArguments, set_seed


@dataclass
class ScriptArguments:
    """Which precision, how much text, and what to ask afterwards."""

    dtype: str = field(default="float32", metadata={"help": "Of the weights: float32, bfloat16 or float16."})
    dialogues: int = field(default=400, metadata={"help": "Dialogues to train on."})
    max_length: int = field(default=128, metadata={"help": "Tokens of a dialogue; what is longer is cut off."})
    held_out: int = field(default=16, metadata={"help": "Dialogues to measure the loss on, before and after."})
    question: str = field(default="What is the capital of France?", metadata={"help": "Asked after training."})


def load_dialogues(count: int, tokenizer, max_length: int) -> Dataset:
    """Dialogues as token ids in the model's chat format; the loss is of what the second speaker says."""
    from chitchat_dataset import Dataset as Chitchat

    rows = []
    for dialogue in Chitchat().values():
        turns = [" ".join(message["text"] for message in turn) for turn in dialogue["messages"]]
        if len(turns) < 4:
            continue
        ids, labels = [], []
        for number, text in enumerate(turns[: 2 * (len(turns) // 2)]):
            speaker = "assistant" if number % 2 else "user"
            piece = tokenizer(f"<|im_start|>{speaker}\n{text}<|im_end|>\n")["input_ids"]
            ids += piece
            labels += piece if speaker == "assistant" else [-100] * len(piece)
        if any(label != -100 for label in labels[:max_length]):
            rows.append({"input_ids": ids[:max_length], "labels": labels[:max_length]})
        if len(rows) == count:
            break
    return Dataset.from_list(rows)


def answer(model, tokenizer, question: str) -> str:
    """The model's reply to a question, greedily."""
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model.eval()
    tokens = model.generate(**inputs.to(model.device), max_new_tokens=24, do_sample=False, use_cache=True)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main() -> None:
    script, args = HfArgumentParser((ScriptArguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(args.seed)
    model, tokenizer = smollm2.load(getattr(torch, script.dtype))
    rows = load_dialogues(script.dialogues + script.held_out, tokenizer, script.max_length)
    trainer = Trainer(
        model,
        args,
        train_dataset=rows.select(range(script.dialogues)),
        eval_dataset=rows.select(range(script.dialogues, len(rows))),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    trainer.save_model()
    print(f"held-out loss: before {before:.3f}, after {trainer.evaluate()['eval_loss']:.3f}")
    print(f"{script.question} {answer(model, tokenizer, script.question)}")


if __name__ == "__main__":
    main()
