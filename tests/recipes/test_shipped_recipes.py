"""Every recipe under recipes/: its first line is its command, and it trains a tiny model of its type for two steps.

Only what names the model, the data, the machine and the number of steps is replaced; Grass runs as the recipe says, at
its rank, so the tiny model of a recipe with r = 1024 is 1,280 wide.
"""

import dataclasses
import json
import shlex
from pathlib import Path

import pytest
import recipe_files as files
import recipe_tokenizers as tokenizers
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

pytest.importorskip("datasets")

from grass_hf import GrassConfig
from grass_hf.convert.conversion import grass_slices
from grass_hf.convert.targets import plan
from grass_hf.recipes import runner
from grass_hf.recipes.parse import load_recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
# What transformers would find on the hub, or in a package, under the names that recipes use.
TYPES = {
    "facebook/opt-1.3b": "opt",
    "FacebookAI/roberta-base": "roberta",
    "meta-llama/Llama-2-7b-hf": "llama",
    "meta-llama/Meta-Llama-3-8B": "llama",
    "meta-llama/Meta-Llama-3-70B": "llama",
    "minilm-l6": "bert",
    "mistralai/Mistral-7B-v0.1": "mistral",
    "mistralai/Mixtral-8x7B-v0.1": "mixtral",
    "openai-community/gpt2": "gpt2",
    "Qwen/Qwen3-0.6B": "qwen3",
    "Qwen/Qwen3-8B": "qwen3",
    "smollm2-135m-instruct": "llama",
}
GROUPED = {"num_key_value_heads": 2}
SHAPES = {
    "bert": {},
    "gpt2": {"n_layer": 1, "n_head": 4},
    "llama": {},
    "mistral": GROUPED,
    "mixtral": {**GROUPED, "num_local_experts": 4},
    "opt": {},
    "qwen3": {**GROUPED, "head_dim": 16},
    "roberta": {},
}
# Neither what is trained nor how.
STEPS = {
    "max_steps": 2,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "use_cpu": "true",
    "disable_tqdm": "true",
}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "recipes"))


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_the_first_line_is_the_command(path):
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    words = shlex.split(first.removeprefix("# "))
    if words[0] == "accelerate":
        assert words[1:3] == ["launch", "--config_file"] and (ROOT / words[3]).is_file()
        words = ["grass-hf", *words[words.index("-m") + 2 :]]
    assert words[:2] == ["grass-hf", "train"] and ROOT / words[2] == path


def test_names_stand_for_what_is_there():
    named = {yaml.safe_load(path.read_text())["model"].get("model_name_or_path") for path in RECIPES}
    assert named - {None} == set(TYPES)


@pytest.mark.parametrize("path", [path for path in RECIPES if "config_name" in path.read_text()], ids=name_of)
def test_the_rank_fits_the_model_of_the_recipe(path):
    said = yaml.safe_load(path.read_text(encoding="utf-8"))
    # under FSDP2 every GPU selects its share of the rows among its own
    blocks = 8 if "fsdp2_8gpu" in path.read_text(encoding="utf-8") else 1
    config = dataclasses.replace(GrassConfig.from_dict(said["grass"]), row_blocks=blocks)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(shipped_config(said["model"])))
    found = plan(model, config)
    layers = model.config.num_hidden_layers
    assert len(found.targets) == 7 * layers and not found.left_out
    if config.rank is not None:
        assert {target.rank for target in found.targets} == {config.rank}
        assert config.rank in (model.config.hidden_size // 4, model.config.hidden_size // 3, 512)  # as published


QWEN = ("<|im_start|>", "<think>", "</think>", "<tool_call>")
# What a model's tokenizer is like, with the chat template that TRL ships for it; the others have none of their own.
KINDS = {
    "meta-llama/Llama-2-7b-hf": tokenizers.sentencepiece,
    "mistralai/Mistral-7B-v0.1": tokenizers.sentencepiece,
    "mistralai/Mixtral-8x7B-v0.1": tokenizers.sentencepiece,
    "Qwen/Qwen3-0.6B": lambda: tokenizers.byte_level(QWEN, "<|im_end|>", tokenizers.template("qwen3")),
    "Qwen/Qwen3-8B": lambda: tokenizers.byte_level(QWEN, "<|im_end|>", tokenizers.template("qwen3")),
    "smollm2-135m-instruct": lambda: tokenizers.byte_level(("<|im_start|>",), "<|im_end|>", tokenizers.CHATML),
    "minilm-l6": tokenizers.word_pieces,
}


def tiny(path, folder, monkeypatch):
    """What a recipe says, its kind of model, and the flags that put tiny things in place of its own."""
    said = yaml.safe_load(path.read_text(encoding="utf-8"))
    kind = model_type(said["model"])
    if said["task"] == "grpo":  # a random model solves no problem: something must tell its replies apart
        monkeypatch.syspath_prepend(path.parent)
        monkeypatch.setattr("gsm8k_rewards.has_result", letters)
    flags = {**STEPS, "output_dir": folder / "out", **model(said, kind, folder), **data(said, folder)}
    return said, kind, flags


def words_of(flags):
    return [word for key, value in flags.items() for word in (f"--{key}", str(value))]


# In `make test`; the whole walk is in `make test-slow`.
SAMPLE = ("finetune/qwen3_8b_ultrachat.yaml",)


@pytest.mark.parametrize(
    "path", [p if name_of(p) in SAMPLE else pytest.param(p, marks=pytest.mark.slow) for p in RECIPES], ids=name_of
)
def test_what_validate_passes_trains(path, tmp_path, monkeypatch, capsys):
    flags = words_of(tiny(path, tmp_path, monkeypatch)[2])
    assert files.grass(monkeypatch, "validate", path, *flags) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    assert "dry run: two steps" in told and not (tmp_path / "out").exists()
    assert files.grass(monkeypatch, "train", path, *flags) == 0, capsys.readouterr().err
    lines = (tmp_path / "out" / "training.jsonl").read_text().splitlines()
    assert [entry["step"] for entry in map(json.loads, lines) if "grad_norm" in entry] == [1, 2]
    example = [line for line in told.splitlines() if line.startswith(("layout", "training", "evaluation"))]
    assert example and set(example) <= set(capsys.readouterr().out.splitlines())  # both saw the same rows


def test_the_sample_is_shipped():
    assert set(SAMPLE) <= set(map(name_of, RECIPES))


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_trains_as_it_says(path, tmp_path, monkeypatch):
    said, kind, flags = tiny(path, tmp_path, monkeypatch)
    recipe = load_recipe(path, words_of(flags))
    for name, value in said["training"].items():
        if name not in flags and isinstance(value, (bool, int, float)):
            assert getattr(recipe.training, name) == value
    built, shown = [], []
    build, describe = runner.build_trainer, runner.preview.describe
    monkeypatch.setattr(runner, "build_trainer", lambda *args: built.append(converted(build(*args))) or built[0][0])
    monkeypatch.setattr(runner.preview, "describe", lambda *args: shown.append(describe(*args)) or shown[0])
    results = runner.train(recipe)
    trainer, config, ranks = built[0]
    assert trainer.model.config.model_type == kind
    assert config == GrassConfig.from_dict(said["grass"])
    assert ranks and all(rank == config.rank_for(size) for size, rank in ranks)
    assert results["steps"] == 2
    if "Qwen" in recipe.path.read_text() and said["task"] != "pretraining":  # in Qwen's own template
        assert "<|im_start|>user\n" in shown[0][-1] and "<|im_start|>assistant\n" in shown[0][-1]
    history = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(history) == 2 and all(0 < entry["grass/coverage"] <= 1 for entry in history)
    assert all(torch.isfinite(torch.tensor(entry["loss"])) and entry["grad_norm"] > 0 for entry in history)
    assert AutoConfig.from_pretrained(tmp_path / "out").model_type == kind


def letters(completions, **columns):
    return [float(len(set(said[-1]["content"]))) for said in completions]


def test_the_rewards_of_gsm8k(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "recipes" / "grpo")
    import gsm8k_rewards

    said = [[{"role": "assistant", "content": "So\n#### 1,072"}], "#### 1072.0 ", "1072", "#### $7 then #### 8"]
    answers = ["It is\n#### 1072", "#### 1072", "#### 1072", "#### 7"]
    assert gsm8k_rewards.correct(said, answer=answers, prompts=said) == [1, 1, 0, 0]
    assert gsm8k_rewards.has_result(said, answer=answers) == [1, 1, 0, 1]


def converted(trainer):
    """The trainer, the settings that its model was converted with, and size and rank of every slice."""
    slices = list(grass_slices(trainer.model))
    return trainer, trainer.model.grass.config, [(slice_.state.size, slice_.state.rank) for slice_ in slices]


def shipped_config(said: dict) -> Path:
    return ROOT / "configs" / f"{said['config_name']}.json"


def model_type(said: dict) -> str:
    if "config_name" in said:
        return json.loads(shipped_config(said).read_text())["model_type"]
    return TYPES[said["model_name_or_path"]]


def model(said: dict, kind: str, folder: Path) -> dict:
    """Flags that put a tiny model in place of the recipe's, with a tokenizer of the same kind."""
    tokenizer = folder / "tokenizer"
    made = KINDS.get(said["model"].get("model_name_or_path"), tokenizers.byte_level)()
    made.save_pretrained(tokenizer)
    width = -(-(said["grass"].get("rank", 51) * 5 // 4) // 64) * 64
    shape = {
        "hidden_size": width,
        "intermediate_size": width + 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "vocab_size": len(made),
        **({"n_embd": width} if kind == "gpt2" else {}),
        **({"ffn_dim": width, "word_embed_proj_dim": width} if kind == "opt" else {}),
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
    }
    config = AutoConfig.for_model(kind, **{**shape, **SHAPES[kind]})
    if "config_name" in said["model"]:
        (folder / "model.json").write_text(config.to_json_string(use_diff=False), encoding="utf-8")
        return {"config_name": folder / "model.json", "tokenizer_name": tokenizer}
    torch.manual_seed(0)
    labelled = said["task"] == "classification"  # a reward model begins as a language model
    auto = AutoModelForSequenceClassification if labelled else AutoModelForCausalLM
    auto.from_config(config).save_pretrained(folder / "model")
    return {"model_name_or_path": folder / "model", "tokenizer_name": tokenizer}


def data(said: dict, folder: Path) -> dict:
    """Flags that put a few local rows of the recipe's layout in place of its dataset."""
    given = said["data"]
    replaced = {name: "null" for name in ("dataset_config", "eval_split", "eval_dataset", "columns") if name in given}
    replaced |= {"split": "train", "holdout": 4, "dataset": folder / "rows.jsonl", "sequence_length": 32}
    if said["task"] == "pretraining":
        rows = [{"text": " ".join(files.sentences()[n : n + 9])} for n in range(30)]
    elif said["task"] == "classification":
        rows = [{"sentence": text, "label": "warm" if "red" in text else "cold"} for text in files.sentences(60)]
    elif said["task"] in ("dpo", "reward", "kto"):
        rows = [{k: turns(k, v) for k, v in row.items()} for row in files.pairs(30)]
        if said["task"] == "kto":
            rows = [{"prompt": r["prompt"], "completion": r["chosen"], "label": n % 2 == 0} for n, r in enumerate(rows)]
        replaced["sequence_length"] = 96
    elif said["task"] == "grpo":
        rows = [{"question": f"How much is {n} + 1?", "answer": f"It is\n#### {n + 1}"} for n in range(30)]
        replaced |= {"columns": "prompt=question", "sequence_length": 250}
        replaced |= {"max_completion_length": 8, "num_generations": 2}
    elif given.get("layout") == "alpaca":
        rows = [{"instruction": f"Colour of {n}?", "output": text} for n, text in enumerate(files.sentences(30))]
        replaced["sequence_length"] = 96
    else:
        rows = files.chats(30)
        replaced["sequence_length"] = 96
    files.write_lines(folder / "rows.jsonl", rows)
    return replaced


def turns(name: str, text: str) -> list[dict]:
    return [{"role": "user" if name == "prompt" else "assistant", "content": text}]
