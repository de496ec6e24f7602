"""The dry run of `grass-hf validate`: two steps of the whole recipe, with its own rows, on a small model of its type.

Everything but the size is real: the task's trainer over all rows, its scheduler, callbacks and optimizer, evaluation,
saving, samples and report. What stops here would stop the training, there perhaps after hours.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import PretrainedConfig, set_seed

from ..config.settings import GrassConfig
from ..convert.targets import plan
from .checks import uses_fsdp
from .models import empty_model, from_config
from .names import text_of
from .runner import carry_out, new_trainer
from .schema import Recipe
from .tasks import Prepared

# Parameters of a model that is trained as it is; of a larger one a small relative is made.
SMALL = 4_000_000
# Most tokens of a sequence of pretraining, whose labels stand everywhere.
TOKENS = 128
_WIDTHS = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_size": 64,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "word_embed_proj_dim": 64,
    "moe_intermediate_size": 32,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}


def rehearse(recipe: Recipe, prepared: Prepared) -> str:
    """Run two steps of the recipe in a folder of its own.

    Returns:
        What was run, or why nothing was, as a line to print.

    Raises:
        Exception: what stops the run, whoever raises it.
    """
    if uses_fsdp(recipe.training) or recipe.training.deepspeed_plugin is not None:
        return "dry run: left out, as the small model would not be sharded by FSDP or DeepSpeed as the real one is"
    state = torch.random.get_rng_state()
    small = _small_config(recipe, prepared.config)
    if small is None:
        return f"dry run: left out, as no small {prepared.config.model_type} could be made"
    with _one_folder() as folder:
        tried = _small_recipe(recipe, dataclasses.replace(prepared, config=small), Path(folder))
        try:
            with _quietly():
                set_seed(recipe.training.seed)
                model = from_config(tried, small)
                trainer = new_trainer(tried, prepared, model)
                _shorten(trainer, recipe)
                carry_out(trainer, tried, prepared, None, Path(folder))
        finally:
            torch.random.set_rng_state(state)
    count = model.num_parameters()
    others = f", in {trainer.args.world_size} processes" if trainer.args.world_size > 1 else ""
    return f"dry run: two steps of a {prepared.config.model_type} of {count:,} parameters, evaluated and saved{others}"


@contextlib.contextmanager
def _one_folder() -> Iterator[str]:
    """A new folder, the same in all processes, which is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        yield broadcast_object_list([folder])[0]
        PartialState().wait_for_everyone()


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep what a run prints for itself."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _small_config(recipe: Recipe, config: PretrainedConfig) -> PretrainedConfig | None:
    """The config itself if its model is small, else one of its type that is; None where none can be built and run."""
    if empty_model(recipe, config).num_parameters() <= SMALL:
        return copy.deepcopy(config)
    for skipped in ((), ("head_dim",), ("num_attention_heads", "num_key_value_heads", "head_dim")):
        small = copy.deepcopy(config)
        for part in (small, *(getattr(small, name) for name in small.sub_configs)):
            for name, value in _WIDTHS.items():
                if getattr(part, name, None) is not None and name not in skipped:
                    with contextlib.suppress(Exception):  # some are computed
                        setattr(part, name, min(value, getattr(part, name)))
            if kinds := getattr(part, "layer_types", None):  # two layers, of both kinds where the model has two
                part.layer_types = [kinds[0], next((kind for kind in kinds if kind != kinds[0]), kinds[0])]
        try:
            with _quietly():
                most = SMALL + 2 * 64 * small.get_text_config().vocab_size
                if empty_model(recipe, small).num_parameters() > most:
                    continue
                model = from_config(recipe, small)
                model.eval()(input_ids=torch.ones(1, 4, dtype=torch.long))
            return small
        except Exception:  # of the model's own code: these sizes do not go together
            continue
    return None


def _small_recipe(recipe: Recipe, prepared: Prepared, folder: Path) -> Recipe:
    """The recipe with two short steps of a small model, in a folder of its own."""
    training = copy.copy(recipe.training)
    evaluates = text_of(training.eval_strategy) != "no"
    saves = text_of(training.save_strategy)
    short: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": min(2, training.per_device_train_batch_size),
        "per_device_eval_batch_size": min(2, training.per_device_eval_batch_size),
        "gradient_accumulation_steps": min(2, training.gradient_accumulation_steps),
        "logging_steps": 1,
        "eval_steps": 1,
        "save_steps": 1,
        "report_to": [],
        "push_to_hub": False,
        "resume_from_checkpoint": None,
        "torch_compile": False,
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "dataloader_prefetch_factor": None,
        "eval_strategy": type(training.eval_strategy)("steps") if evaluates else training.eval_strategy,
        "save_strategy": training.save_strategy if saves in ("no", "best") else type(training.save_strategy)("steps"),
    }
    if recipe.task == "grpo":  # its batches hold whole groups of replies
        del short["per_device_train_batch_size"], short["per_device_eval_batch_size"]
        del short["gradient_accumulation_steps"]
        short["max_completion_length"] = min(8, training.max_completion_length)
    for name, value in short.items():
        setattr(training, name, value)
    return dataclasses.replace(recipe, training=training, grass=_small_grass(recipe, prepared))


def _small_grass(recipe: Recipe, prepared: Prepared) -> GrassConfig | None:
    """The settings of Grass, as far as they fit the small model: the real one's were matched before."""
    if recipe.grass is None:
        return None
    model = empty_model(recipe, prepared.config)
    plain = dataclasses.replace(recipe.grass, rank=None, density=0.25, rank_pattern=None, density_pattern=None)
    for config in (recipe.grass, plain, dataclasses.replace(plain, target_modules="all-linear")):
        with contextlib.suppress(ValueError):
            plan(model, config)
            return config
    return plain


def _shorten(trainer: Any, recipe: Recipe) -> None:
    """Keep a few rows: all of them were prepared, which is what could fail."""
    training = trainer.args
    count = 4 * training.per_device_train_batch_size * training.gradient_accumulation_steps
    trainer.train_dataset = trainer.train_dataset.take(count)
    if trainer.eval_dataset is not None:
        trainer.eval_dataset = trainer.eval_dataset.take(2 * training.per_device_eval_batch_size)
    if recipe.task == "pretraining":
        collate = trainer.data_collator
        trainer.data_collator = lambda rows: {name: part[:, :TOKENS] for name, part in collate(rows).items()}
