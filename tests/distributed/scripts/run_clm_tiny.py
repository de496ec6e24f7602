"""A script as the Hugging Face examples write them: it knows the Trainer and nothing else."""

from dataclasses import dataclass, field

import torch
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments


@dataclass
class ModelArguments:
    hidden_size: int = field(default=32, metadata={"help": "Width of the model."})


@dataclass
class DataArguments:
    sequences: int = field(default=32, metadata={"help": "Training sequences."})


def main():
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    torch.manual_seed(training_args.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=model_args.hidden_size,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=40,
        )
    )
    tokens = (torch.arange(data_args.sequences)[:, None] + torch.arange(10)) % 40
    dataset = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = Trainer(model=model, args=training_args, train_dataset=dataset)
    trainer.train()
    trainer.save_model()
    print("world", training_args.world_size, "optim", str(training_args.optim.value))
    print(
        "checksum",
        sum(p.double().abs().sum().item() for n, p in model.named_parameters() if "active" not in n),
    )


if __name__ == "__main__":
    main()
