"""Pretrain a small LLaMA from scratch on the State of the Union speeches, with the Hugging Face Trainer.

Written like transformers' own `run_clm.py`: three dataclasses, one `Trainer`, and nothing about the
optimizer, which is whatever `optim` and `optim_args` name. Give it flags, a YAML recipe, or a recipe and then
flags that override it:

    pretrain_sotu.py RECIPE.yaml [--learning_rate 1e-3 ...]

It splits the speeches by document, trains a byte-level BPE tokenizer on the training documents, packs them
into blocks, measures the perplexity on the held-out documents before and after training, and leaves in
`output_dir`:

    config.json, model.safetensors, tokenizer files    a plain Hugging Face checkpoint
    training.jsonl, trainer_state.json                 every logged number, one JSON object a line
    loss.png, report.md, report.html                   the run on one page
"""

import json
import math
import sys
import time
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path

import torch
import yaml
from run_report import Run, plot_curves, versions, write_reports
from sotu_text import UserError, load_speeches, pack, train_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    HfArgumentParser,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)


@dataclass
class ModelArguments:
    """Which model to train from scratch."""

    _argument_group_name = "model"

    model_config: str = field(
        default="configs/llama_9m.json",
        metadata={"help": "Model config JSON; its vocab_size is replaced by the tokenizer's."},
    )
    tokenizer_vocab_size: int = field(
        default=8192,
        metadata={"help": "Pieces of the byte-level BPE tokenizer trained on the training speeches."},
    )


@dataclass
class DataArguments:
    """Which speeches to train on, how to cut them, and where the results go."""

    _argument_group_name = "data and report"

    block_size: int = field(default=256, metadata={"help": "Tokens in one packed training example."})
    holdout_every: int = field(
        default=12,
        metadata={"help": "Every N-th year's speeches are held out for evaluation, whole documents only."},
    )
    max_speeches: int | None = field(
        default=None,
        metadata={"help": "Use this many speeches, evenly spread over the years, for a quick try."},
    )
    prompt: str = field(
        default="The state of the Union", metadata={"help": "Beginning of the sentence generated at the end."}
    )
    json: str | None = field(default=None, metadata={"help": "Also write the results to this JSON file."})


def make_parser() -> HfArgumentParser:
    """The parser of this script: `model`, `data and report`, then every field of `TrainingArguments`."""
    return HfArgumentParser(
        (ModelArguments, DataArguments, TrainingArguments),
        prog="pretrain_sotu.py",
        usage="%(prog)s [RECIPE.yaml] [--flag value ...]",
        description="Pretrain a small LLaMA on the State of the Union speeches with the Trainer.",
        epilog="Flags after a recipe override it. Recipes for this script: recipes/pretrain/.",
    )


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Parse flags, a YAML recipe, or a recipe followed by flags (which win).

    Raises:
        UserError: the recipe is missing or no mapping, or a key, flag or value is not a valid one.
    """
    parser = make_parser()
    if argv and argv[0].endswith((".yaml", ".yml")):
        parser.set_defaults(**load_recipe(argv[0], parser))
        argv = argv[1:]
    try:
        return parser.parse_args_into_dataclasses(args=argv, look_for_args_file=False)
    except ValueError as error:
        hint = " (an optimizer that a plugin adds needs that plugin's launcher: see the recipe's first line)"
        raise UserError(f"{error}{hint if 'OptimizerNames' in str(error) else ''}") from error


def load_recipe(path: str, parser: HfArgumentParser) -> dict:
    """The recipe's fields, every one of which the parser must know."""
    if not Path(path).is_file():
        raise UserError(f"recipe={path} is not a file: give the path of a YAML recipe, e.g. one of recipes/pretrain/")
    recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(recipe, dict):
        raise UserError(f"recipe={path} holds no `name: value` lines: see recipes/pretrain/ for the form")
    known = [f.name for kind in parser.dataclass_types for f in fields(kind) if f.init]
    for key in recipe.keys() - set(known):
        near = get_close_matches(str(key), known, n=1)
        raise UserError(f"{key} in {path} is not a setting of this script" + (f": {near[0]}?" if near else ""))
    return recipe


def build_model(args: ModelArguments, tokenizer: PreTrainedTokenizerFast, block_size: int) -> torch.nn.Module:
    """The config's model with random weights and the tokenizer's vocabulary."""
    if not Path(args.model_config).is_file():
        raise UserError(f"model_config={args.model_config} is not a file: give one of configs/*.json")
    end = tokenizer.eos_token_id
    config = AutoConfig.from_pretrained(
        args.model_config, vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, pad_token_id=end
    )
    if block_size > config.max_position_embeddings:
        raise UserError(
            f"block_size={block_size} exceeds the model's {config.max_position_embeddings} positions: "
            "give a smaller one or another model_config"
        )
    return AutoModelForCausalLM.from_config(config)


def perplexity(loss: float) -> float:
    """exp(mean loss in nats), infinite where that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def generate_sentence(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """Sample a continuation of `prompt`, up to the first full stop."""
    model.eval()
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=60, do_sample=True, top_k=40, temperature=0.8)
    text = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    head, stop, _ = text.partition(".")
    return " ".join((prompt + head + stop).split())


def main() -> None:
    """Train, evaluate, save and report, as the arguments say."""
    model_args, data_args, training_args = parse_arguments(sys.argv[1:])
    training_args.output_dir = training_args.output_dir or "runs/pretrain_sotu"
    output = Path(training_args.output_dir)
    started = time.perf_counter()
    is_main = training_args.process_index == 0

    def say(text: str) -> None:
        if is_main:
            print(text, flush=True)

    with training_args.main_process_first(desc="tokenizer and packing"):
        train_texts, eval_texts = load_speeches(data_args.holdout_every, data_args.max_speeches)
        tokenizer = train_tokenizer(train_texts, model_args.tokenizer_vocab_size, data_args.block_size)
        train_data = pack(train_texts, tokenizer, data_args.block_size, "training")
        eval_data = pack(eval_texts, tokenizer, data_args.block_size, "held-out")
    set_seed(training_args.seed)
    model = build_model(model_args, tokenizer, data_args.block_size)
    parameters = model.num_parameters()
    say(
        f"{len(train_texts)} speeches to train on, {len(eval_texts)} held out "
        f"({len(train_data)} and {len(eval_data)} blocks of {data_args.block_size} tokens); "
        f"model of {parameters:,} parameters"
    )

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=train_data,
        eval_dataset=eval_data,
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    untrained = trainer.evaluate()["eval_loss"]
    say(f"held-out perplexity before training: {perplexity(untrained):.1f}")
    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trained = trainer.evaluate()["eval_loss"]

    trainer.save_model()  # the tokenizer goes with it
    trainer.save_state()
    if not is_main:
        return
    history = trainer.state.log_history
    with open(output / "training.jsonl", "w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(entry) + "\n" for entry in history)
    sentence = generate_sentence(trainer.accelerator.unwrap_model(trainer.model), tokenizer, data_args.prompt)

    tokens = trainer.state.global_step * training_args.train_batch_size * data_args.block_size
    tokens *= training_args.gradient_accumulation_steps * training_args.world_size
    seconds = result.metrics["train_runtime"]
    resumed = training_args.resume_from_checkpoint is not None  # then the seconds are not those of all steps
    eval_bytes_per_token = sum(len(text.encode()) for text in eval_texts) / sum(
        len(ids) + 1 for ids in tokenizer(eval_texts, add_special_tokens=False, verbose=False)["input_ids"]
    )
    run = Run(
        title="Pretraining on the State of the Union speeches",
        results={
            "held-out perplexity, untrained": perplexity(untrained),
            "held-out perplexity, trained": perplexity(trained),
            "held-out bits per byte, untrained": untrained / math.log(2) / eval_bytes_per_token,
            "held-out bits per byte, trained": trained / math.log(2) / eval_bytes_per_token,
            "optimizer steps": trainer.state.global_step,
            "training tokens": tokens,
            "tokens per second (evaluations during training included)": None if resumed else tokens / seconds,
            "training time (s)": seconds,
            "wall time of the whole run (s)": time.perf_counter() - started,
        },
        settings={
            "command": " ".join(sys.argv),
            "model": f"{model_args.model_config}, {parameters:,} parameters, vocabulary {len(tokenizer)}",
            "data": f"{len(train_texts)} speeches trained on, {len(eval_texts)} held out (all of one "
            f"year in {data_args.holdout_every}), blocks of {data_args.block_size} tokens",
            "optim": training_args.optim.value,
            "optim_args": training_args.optim_args,
            "learning_rate": training_args.learning_rate,
            "lr_scheduler_type": training_args.lr_scheduler_type.value,
            "weight_decay": training_args.weight_decay,
            "batch": f"{training_args.train_batch_size} blocks x {training_args.gradient_accumulation_steps} "
            f"accumulated x {training_args.world_size} processes",
            "precision": "bf16" if training_args.bf16 else "fp16" if training_args.fp16 else "fp32",
            "seed": training_args.seed,
        },
        versions=versions("grass-hf", "torch", "transformers", "accelerate", "datasets", "tokenizers", "sotu"),
        sentence=sentence,
    )
    figure = plot_curves(history, untrained, output / "loss.png", title=run.title)
    write_reports(run, figure, output)
    if data_args.json:
        Path(data_args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(data_args.json).write_text(json.dumps(run.as_json(), indent=2) + "\n", encoding="utf-8")
    say(f"checkpoint, curves and report: {output}/ (open {output / 'report.html'})")
    say(f"generated: {sentence}")
    say(f"perplexity: untrained {perplexity(untrained):.1f}, trained {perplexity(trained):.1f}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"pretrain_sotu.py: error: {error}")
