"""Recipes: what file and flags mean, what is wrong with one, how rows are laid out and encoded."""

import itertools
import json
import os
import warnings
from pathlib import Path

import pytest
import recipe_files as files
import yaml

pytest.importorskip("datasets")

from grass_hf import GrassConfig
from grass_hf.config.optim_args import parse_optim_args
from grass_hf.recipes import layouts
from grass_hf.recipes.encode import chat_encoder
from grass_hf.recipes.metrics import f1, perplexity
from grass_hf.recipes.parse import load_recipe
from grass_hf.recipes.rows import BadRow, place

ROOT = Path(__file__).parents[2]


# -- file and flags ----------------------------------------------------------------------------------------------


def test_flags_replace_what_the_file_says(tmp_path):
    path = files.write(tmp_path, files.pretraining(tmp_path))
    flags = (
        "--learning_rate 3e-4 --grass.seed 7 --rank 4 --selection=uniform --target_modules q_proj;v_proj --max-steps 9"
    )
    recipe = load_recipe(path, [*flags.split(), "--prompts", "one", "two words", "--tokenizer_name", "somewhere"])
    assert (recipe.training.learning_rate, recipe.training.max_steps) == (3e-4, 9)
    assert (
        recipe.grass.to_dict() | {"rank": 4, "density": None, "seed": 7, "selection": "uniform"}
        == recipe.grass.to_dict()
    )
    assert recipe.grass.target_modules == ("q_proj", "v_proj")
    assert recipe.evaluation.prompts == ["one", "two words"]
    assert (recipe.model.tokenizer_name, recipe.model.tokenizer_vocab_size) == ("somewhere", None)
    assert load_recipe(path, grass=False).grass is None
    assert load_recipe(path, ["--target_modules", ".*mlp.*"]).grass.target_modules == ".*mlp.*"
    preset = load_recipe(path, ["--preset", "max_memory", "--side", "input"]).grass
    assert not preset.resident and preset.side == "input"
    assert load_recipe(path, ["--prompts", "null"]).evaluation.prompts in (None, [])


def test_the_section_grass_may_name_the_base_optimizer(tmp_path):
    said = files.pretraining(tmp_path)
    said["grass"] = {"preset": "muon", "update_interval": 5}
    path = files.write(tmp_path, said)
    recipe = load_recipe(path)
    assert recipe.base == "muon"
    assert recipe.grass == parse_optim_args("preset=muon,update_interval=5").config
    assert load_recipe(path, ["--base", "sgd"]).base == "sgd"
    for plain in (load_recipe(path, ["--base", "null", "--preset", "null"]), load_recipe(path, grass=False)):
        assert plain.base == plain.training.optim


def test_the_section_grass_may_give_layers_densities_of_their_own(tmp_path):
    said = files.pretraining(tmp_path)
    said["grass"] = {"density": 0.25, "density_pattern": {"[qk]_proj": 0.5, "o_proj": 1}}
    path = files.write(tmp_path, said)
    recipe = load_recipe(path)
    assert recipe.grass == GrassConfig(density=0.25, density_pattern={"[qk]_proj": 0.5, "o_proj": 1})
    assert "density 0.25, 0.5 of [qk]_proj, 1 of o_proj" in recipe.method
    changed = load_recipe(path, ["--density_pattern", "v_proj:0.5;o_proj:0.75"]).grass
    assert changed.density_pattern == {"v_proj": 0.5, "o_proj": 0.75}
    assert load_recipe(path, ["--density_pattern", "null"]).grass == GrassConfig(density=0.25)
    said["grass"]["density_pattern"] = {"o_proj": "much"}
    with pytest.raises(ValueError, match=r"grass: density_pattern\['o_proj'\]='much' is a str"):
        load_recipe(files.write(tmp_path, said))


def test_yaml_values_have_the_types_of_the_fields(tmp_path):
    said = files.pretraining(tmp_path)
    said["training"] |= {
        "learning_rate": "1e-3",
        "lr_scheduler_kwargs": {"min_lr": 0.1},
        "lr_scheduler_type": "cosine_with_min_lr",
    }
    said["training"] |= {"report_to": ["tensorboard", "wandb"], "bf16": False, "logging_steps": 5}
    said["grass"] |= {"scale": "5e-1", "target_modules": ["q_proj"]}
    said["data"]["columns"] = {"text": "text"}
    recipe = load_recipe(files.write(tmp_path, said))
    assert recipe.training.learning_rate == 1e-3 and recipe.training.lr_scheduler_kwargs == {"min_lr": 0.1}
    assert recipe.training.report_to == ["tensorboard", "wandb"]
    assert recipe.grass.scale == 0.5 and recipe.grass.target_modules == ("q_proj",)
    assert recipe.data.column_names == {"text": "text"}


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_both_names_of_checkpointing_are_taken(name, tmp_path):
    said = files.pretraining(tmp_path)
    said["training"].pop("gradient_checkpointing", None)
    said["training"] |= {name: True, f"{name}_kwargs": {"every_n_layers": 2}}
    path = files.write(tmp_path, said)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        training = load_recipe(path).training
        off = load_recipe(path, ["--gradient_checkpointing", "false"]).training
        also = load_recipe(path, ["--activation_checkpointing", "false"]).training
    assert training.gradient_checkpointing is True
    assert training.gradient_checkpointing_kwargs == {"every_n_layers": 2}
    assert off.gradient_checkpointing is also.gradient_checkpointing is False
    said["training"] |= {"gradient_checkpointing": True, "activation_checkpointing": True}
    with pytest.raises(ValueError, match="two names of one field"):
        load_recipe(files.write(tmp_path, said))


def test_dry_run_prints_a_recipe_that_means_the_same(tmp_path, monkeypatch, capsys):
    path = files.write(tmp_path, files.pretraining(tmp_path))
    flags = ["--rank", "4", "--rank_pattern", "q_proj:8", "--base", "muon"]
    assert files.grass(monkeypatch, "train", path, "--dry-run", *flags) == 0
    printed = capsys.readouterr().out
    (tmp_path / "again.yaml").write_text(printed)
    first, again = load_recipe(path, flags), load_recipe(tmp_path / "again.yaml")
    assert (again.grass, again.base, again.data, again.model, again.evaluation) == (
        first.grass,
        "muon",
        first.data,
        first.model,
        first.evaluation,
    )
    assert again.training.to_dict() == first.training.to_dict()
    assert not (tmp_path / "out").exists()


# -- mistakes ----------------------------------------------------------------------------------------------------


def _set(section, **fields):
    def change(said, folder):
        said[section] = {**(said.get(section) or {}), **{k: v(folder) if callable(v) else v for k, v in fields.items()}}

    return change


def _rows(text):
    def change(said, folder):
        (folder / "texts.jsonl").write_text(text)

    return change


def _task(make):
    def change(said, folder):
        said.update(make(folder))

    return change


def _and(*changes):
    def change(said, folder):
        for one in changes:
            one(said, folder)

    return change


def _other_checkpoint(folder):
    """A checkpoint of a narrower model."""
    path = files.causal_folder(folder / "checkpoint-3", hidden_size=16)
    (path / "trainer_state.json").write_text("{}")
    return str(path)


def _file(folder):
    (folder / "file").write_text("")
    return str(folder / "file" / "out")


GOOD = '{"text": "The car is red and so is the house, which stands at the river."}\n'
WRONG = {
    "a misspelt field": (_set("training", learning_rat=1), ["'learning_rat'", "did you mean learning_rate?"]),
    "a misspelt section": (lambda s, f: s.update(trainig=s.pop("training")), ["'trainig'", "did you mean training?"]),
    "a field in another section": (_set("model", learning_rate=1), ["learning_rate is a field of `training`"]),
    "a field outside": (lambda s, f: s.update(rank=4), ["rank stands outside its section", "`grass:`"]),
    "no section but a value": (lambda s, f: s.update(data="x"), ["data holds 'x'"]),
    "no task": (lambda s, f: s.pop("task"), ["no task", "pretraining"]),
    "a misspelt task": (lambda s, f: s.update(task="pretrainin"), ["'pretrainin'", "did you mean pretraining?"]),
    "no number": (_set("training", max_steps="many"), ["training.max_steps", "'many'"]),
    "an unknown scheduler": (_set("training", lr_scheduler_type="cosin"), ["'cosin'", "did you mean cosine"]),
    "an unknown optimizer": (_set("training", optim="adamw_tosh"), ["'adamw_tosh'", "did you mean adamw_torch"]),
    "an optimizer that cannot": (_set("training", optim="lomo"), ["training.optim=lomo", "use adamw_torch"]),
    "grass twice": (_set("training", optim="grass"), ["training.optim=grass", "adamw_torch"]),
    "a rule that is none": (_set("grass", selection="top_k"), ["selection='top_k'", "did you mean 'top_r'?"]),
    "rank and density": (_set("grass", rank=4), ["rank=4 and density=0.25"]),
    "a rank above every layer": (_set("grass", density=None, rank=99), ["rank=99 is above", "density=0.25"]),
    "targets that match nothing": (_set("grass", target_modules=["wq"]), ["'wq'", "q_proj"]),
    "two models": (_set("model", model_name_or_path="x"), ["both are given", "config_name"]),
    "no such config": (_set("model", config_name="nowhere.json"), ["nowhere.json", "is not a file"]),
    "no such weights": (
        lambda s, f: s.update(model={"model_name_or_path": "./nowhere"}),
        ["./nowhere", "packaged models"],
    ),
    "no such data": (_set("data", dataset="./nowhere.jsonl"), ["./nowhere.jsonl is not a file"]),
    "no such hub data": (_set("data", dataset="nobody/nothing"), ["nobody/nothing", "hub", "sotu"]),
    "a column that is none": (_set("data", columns={"text": "txt"}), ["'txt'", "did you mean text?"]),
    "no fitting column": (_rows('{"body": "x"}\n'), ["columns body", "text=body"]),
    "broken JSON": (_rows(GOOD * 3 + '{"text": \n'), ["texts.jsonl, line 4", "not valid JSON"]),
    "a number for a text": (_rows(GOOD + '{"text": 5}\n'), ["texts.jsonl, line 2", "text is 5"]),
    "a missing text": (_rows(GOOD + "\n" + '{"text": null}\n' + GOOD), ["texts.jsonl, line 3", "text is missing"]),
    "longer than the model": (_set("data", sequence_length=500), ["sequence_length=500", "128 positions"]),
    "longer than the text": (_and(_rows(GOOD * 2), _set("data", sequence_length=128)), ["sequence_length=128", "text"]),
    "a holdout of all": (_set("data", holdout=60), ["holdout=60", "60 rows"]),
    "a stream without steps": (
        _and(_set("data", streaming=True, holdout=2), _set("training", max_steps=-1)),
        ["max_steps is missing", "stream"],
    ),
    "no tokenizer": (_set("model", tokenizer_vocab_size=None), ["tokenizer", "tokenizer_vocab_size"]),
    "a tiny tokenizer": (_set("model", tokenizer_vocab_size=99), ["tokenizer_vocab_size=99", "512"]),
    "two ways to train": (_set("lora", lora_r=4), ["grass and lora", "--no-grass"]),
    "adapters of rank 0": (_and(lambda s, f: s.pop("grass"), _set("lora", lora_r=0)), ["lora.lora_r=0", "1 or more"]),
    "a misspelt field of lora": (_set("lora", lora_rank=4), ["'lora_rank'", "did you mean lora_"]),
    "adapters nowhere": (
        _and(lambda s, f: s.pop("grass"), _set("lora", lora_target_modules=["wq"])),
        ["lora: ", "wq"],
    ),
    "no place to write": (_set("training", output_dir=_file), ["file", "another folder"]),
    "no output folder": (_set("training", output_dir=None), ["output_dir is missing"]),
    "another run's folder": (_set("training", output_dir=lambda f: str(f)), ["is not empty", "--overwrite"]),
    "nothing to resume": (
        _set("training", resume_from_checkpoint="true"),
        ["resume_from_checkpoint=true", "no checkpoint"],
    ),
    "no checkpoint": (_set("training", resume_from_checkpoint=lambda f: str(f)), ["no trainer_state.json"]),
    "another model's checkpoint": (
        _set("training", resume_from_checkpoint=_other_checkpoint),
        ["is of another model", "shape"],
    ),
    "no chat template": (
        lambda s, f: (_task(files.finetuning)(s, f), (f / "model" / "chat_template.jinja").unlink()),
        ["no chat template", "plain"],
    ),
    "a chat without replies": (
        _task(lambda f: files.finetuning(f, [*files.chats(2), {"messages": files.chats(1)[0]["messages"][:1]}])),
        ["chats.jsonl, line 3", "no turn of the assistant"],
    ),
    "a turn without a role": (
        _task(lambda f: files.finetuning(f, [{"messages": [{"role": "nobody", "content": "x"}]}])),
        ["chats.jsonl, line 1", "'nobody'"],
    ),
    "a label that is none": (
        _and(_task(files.classification), _set("data", labels=["warm", "hot"])),
        ["label 'cold'", "warm, hot"],
    ),
    "TRL's own length": (_and(_task(files.finetuning), _set("training", max_length=9)), ["data.sequence_length"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_recipe_gets_a_sentence_and_writes_nothing(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    change, mentions = WRONG[name]
    said = files.pretraining(tmp_path)
    if any(word in name for word in ("chat", "turn", "TRL")):
        pytest.importorskip("trl")
    change(said, tmp_path)
    path = files.write(tmp_path, said)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert files.grass(monkeypatch, "train", path) == 2
    error = capsys.readouterr().err
    sentence = error.strip().splitlines()[-1]
    assert sentence.startswith("grass-hf: ") and "Traceback" not in error
    for mention in mentions:
        assert mention in sentence, sentence
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text, mentions",
    [
        (None, ["missing.yaml cannot be read", "No such file"]),
        ("task: [pretraining\nmodel: {", ["is not valid YAML", "line"]),
        ("- a list\n", ["has no sections"]),
        ("task: pretraining\ndata:\n  dataset: a\n  dataset: b\n", ["dataset stands there twice", "line 4"]),
        ("\xff", ["has no sections"]),
    ],
    ids=["missing", "yaml", "list", "twice", "text"],
)
def test_a_file_that_is_no_recipe(text, mentions, tmp_path, monkeypatch, capsys):
    path = tmp_path / "missing.yaml"
    if text is not None:
        path.write_text(text)
    assert files.grass(monkeypatch, "validate", path) == 2
    error = capsys.readouterr().err
    assert all(mention in error for mention in mentions), error


@pytest.mark.parametrize(
    "flags, mention",
    [
        (["--seed", "1"], "write --grass.seed or --training.seed"),
        (["--learning_rat", "1"], "did you mean --learning_rate?"),
        (["--grass.rnk", "1"], "did you mean rank?"),
        (["--gras.rank", "1"], "did you mean grass?"),
        (["--preset", "papre"], "did you mean paper?"),
        (["--base", "muonn"], "grass.base: 'muonn' is not an optimizer of the installed Trainer: did you mean muon?"),
        (["--base", "lomo"], "grass.base=lomo updates weights during backward"),
        (["--max_steps", "x"], "training.max_steps: invalid int value: 'x'"),
        (["three"], "'three' is no flag"),
    ],
)
def test_wrong_flags(flags, mention, tmp_path, monkeypatch, capsys):
    path = files.write(tmp_path, files.pretraining(tmp_path))
    assert files.grass(monkeypatch, "train", path, *flags) == 2
    assert mention in capsys.readouterr().err


def test_an_engine_that_is_not_supported(tmp_path, monkeypatch, capsys):
    from transformers import TrainingArguments

    path = files.write(tmp_path, files.pretraining(tmp_path))
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    assert files.grass(monkeypatch, "train", path) == 2
    assert "nn.DataParallel" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_no_permission_to_write(tmp_path, monkeypatch, capsys):
    path = files.write(tmp_path, files.pretraining(tmp_path))
    monkeypatch.setattr("os.access", lambda path, mode: not mode & os.W_OK)  # root may write everywhere
    assert files.grass(monkeypatch, "train", path) == 2
    assert "there is no permission to write in" in capsys.readouterr().err


# -- validate ----------------------------------------------------------------------------------------------------


def test_validate_says_what_would_happen(tmp_path, monkeypatch, capsys):
    path = files.write(tmp_path, files.pretraining(tmp_path))
    assert files.grass(monkeypatch, "validate", path, "--json", tmp_path / "found" / "found.json") == 0
    out = capsys.readouterr().out
    for mention in ("layout: text", "one example:", "14 weights", "nothing is wrong", "at the peak of a step"):
        assert mention in out
    found = json.loads((tmp_path / "found" / "found.json").read_text())
    ranks = [found["targets"][f"model.layers.0.mlp.{name}_proj"] for name in ("gate", "down")]
    assert ranks == [8, 12] and found["memory"]["peak"] > 0  # a quarter of their 32 and 48 columns
    assert not (tmp_path / "out").exists()


def test_validate_counts_the_layers_that_are_recomputed(tmp_path, monkeypatch, capsys):
    path, found = files.write(tmp_path, files.pretraining(tmp_path)), tmp_path / "found.json"
    peaks = []
    for flags in (["true"], ["true", "--gradient_checkpointing_kwargs", '{"every_n_layers": 2}'], ["false"]):
        words = ("--json", found, "--per_device_train_batch_size", "32", "--gradient_checkpointing", *flags)
        assert files.grass(monkeypatch, "validate", path, *words) == 0
        peaks.append(json.loads(found.read_text())["memory"]["peak"])
    assert peaks[0] < peaks[1] < peaks[2]


def test_validate_refuses_what_does_not_fit(tmp_path, monkeypatch, capsys):
    path = files.write(tmp_path, files.pretraining(tmp_path))
    assert files.grass(monkeypatch, "validate", path, "--budget", "20kB") == 2
    assert "--budget" in capsys.readouterr().err
    assert files.grass(monkeypatch, "validate", path, "--budget", "much") == 2
    assert "'much' is not a size" in capsys.readouterr().err


@pytest.mark.parametrize("make", [files.classification, files.preferences, files.finetuning], ids=lambda m: m.__name__)
def test_validate_knows_every_task(make, tmp_path, monkeypatch, capsys):
    if make is not files.classification:
        pytest.importorskip("trl")
    assert files.grass(monkeypatch, "validate", files.write(tmp_path, make(tmp_path))) == 0
    assert "nothing is wrong" in capsys.readouterr().out


# -- rows ----------------------------------------------------------------------------------------------------------

QUESTION = [{"role": "user", "content": "Why?"}]
ANSWER = [{"role": "assistant", "content": "So."}]
LAYOUTS = {
    "alpaca": ("sft", {"instruction": "Why?", "input": "", "output": "So."}, {"messages": QUESTION + ANSWER}),
    "alpaca with input": (
        "sft",
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"messages": [{"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}]},
    ),
    "sharegpt": (
        "sft",
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}], "system": "Be brief."},
        {"messages": [{"role": "system", "content": "Be brief."}, *QUESTION, *ANSWER]},
    ),
    "messages": ("sft", {"messages": QUESTION + ANSWER, "id": 3}, {"messages": QUESTION + ANSWER}),
    "prompt_completion": ("sft", {"prompt": "1+1=", "completion": "2"}, {"prompt": "1+1=", "completion": "2"}),
    "prompt_completion chats": ("sft", {"prompt": QUESTION, "completion": ANSWER}, {"messages": QUESTION + ANSWER}),
    "text": ("pretraining", {"text": "All.", "url": "x"}, {"text": "All."}),
    "preference": (
        "dpo",
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ),
    "preference with the prompt inside": (
        "dpo",
        {
            "prompt": "Why?",
            "chosen": QUESTION + ANSWER,
            "rejected": [*QUESTION, {"role": "assistant", "content": "No."}],
        },
        {"prompt": QUESTION, "chosen": ANSWER, "rejected": [{"role": "assistant", "content": "No."}]},
    ),
    "preference without a prompt": (
        "dpo",
        {"chosen": QUESTION + ANSWER, "rejected": [*QUESTION, {"role": "assistant", "content": "No."}]},
        {"prompt": QUESTION, "chosen": ANSWER, "rejected": [{"role": "assistant", "content": "No."}]},
    ),
    "glue": (
        "classification",
        {"sentence1": "a", "sentence2": "b", "label": 1, "idx": 0},
        {"text": "a", "text_pair": "b", "label": 1},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_found_and_mapped(name):
    task, row, expected = LAYOUTS[name]
    layout, names = layouts.find_layout(task, "auto", row, {})
    assert layout == ("classification" if name == "glue" else name.split()[0])
    assert layouts.converter(layout, names)(row) == expected


def test_columns_of_other_names():
    layout, names = layouts.find_layout(
        "classification", "auto", ["review", "stars"], {"text": "review", "label": "stars"}
    )
    assert layouts.converter(layout, names)({"review": "Good.", "stars": 4}) == {"text": "Good.", "label": 4}


@pytest.mark.parametrize(
    "task, row, reason",
    [
        ("classification", {"text": "a", "label": -1}, "label is -1"),
        ("classification", {"text": "a", "label": 0.5}, "label is 0.5"),
        ("classification", {"text": " ", "label": 1}, "text is empty"),
        ("dpo", {"chosen": "a", "rejected": "b"}, "needs a column prompt"),
        ("dpo", {"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
        ("sft", {"messages": "hello"}, "not a list of turns"),
        ("sft", {"messages": [{"role": "user"}]}, "turn 1 of messages"),
        ("sft", {"instruction": "a", "output": None}, "output is missing"),
    ],
)
def test_bad_rows(task, row, reason):
    layout, names = layouts.find_layout(task, "auto", row, {})
    with pytest.raises(BadRow, match=reason):
        layouts.converter(layout, names)(row)


def test_places_of_rows(tmp_path):
    first = tmp_path / "a.jsonl"
    first.write_text('{"text": "a"}\n\n{"text": "b"}\n')
    second = tmp_path / "b.jsonl"
    second.write_text('{"text": "c"}\n')
    assert place([first, second], 1) == f"{first}, line 3"
    assert place([first, second], 2) == f"{second}, line 1"
    listed = tmp_path / "c.json"
    listed.write_text(json.dumps([{"text": "a"}, {"text": "b"}], indent=1))
    assert place([listed], 1) == f"{listed}, line 5"
    table = tmp_path / "d.csv"
    table.write_text('text,label\n"two\nlines",1\nb,0\n')
    assert place([table], 1) == f"{table}, line 4"


# -- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss_on, learnt",
    [
        ("replies", ["It is red.<|endoftext|>\n\n", "You are welcome.<|endoftext|>\n\n"]),
        ("last_reply", ["You are welcome.<|endoftext|>\n\n"]),
    ],
)
def test_the_loss_is_of_the_replies(loss_on, learnt):
    pieces = files.tokenizer()
    row = files.chats(1)[0]
    ids, mask = chat_encoder(pieces, loss_on, None)(row)
    assert pieces.decode(ids) == pieces.apply_chat_template(row["messages"], tokenize=False)
    marked = [pieces.decode([token]) if learn else None for token, learn in zip(ids, mask, strict=True)]
    runs = ["".join(run) for learn, run in itertools.groupby(marked, lambda piece: piece is not None) if learn]
    assert runs == learnt


def test_the_loss_on_everything_and_a_system_prompt():
    pieces = files.tokenizer()
    ids, mask = chat_encoder(pieces, "everything", "Be brief.")(files.chats(1)[0])
    assert all(mask) and pieces.decode(ids).startswith("Be brief.\n\n### User:\n")


def test_a_template_that_rewrites_earlier_turns_is_refused():
    pieces = files.tokenizer()
    pieces.chat_template = "{{ messages | length }}" + pieces.chat_template
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        chat_encoder(pieces, "replies", None)(files.chats(1)[0])


def test_plain_prompts_learn_the_completion():
    pieces = files.tokenizer()
    ids, mask = chat_encoder(pieces, "replies", None)({"prompt": "The car", "completion": " is red."})
    assert pieces.decode([i for i, learn in zip(ids, mask, strict=True) if learn]) == " is red.<|endoftext|>"


# -- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_by_hand():
    import numpy as np
    import torch
    from transformers import EvalPrediction

    from grass_hf.recipes import metrics

    assert perplexity(0.0) == 1.0 and perplexity(1e9) == float("inf")
    assert f1(np.array([1, 1, 0, 0], bool), np.array([1, 0, 1, 0], bool)) == 0.5
    found = metrics.classification_metrics(EvalPrediction(np.array([1, 1, 0]), np.array([1, 0, 0])))
    assert found == {"accuracy": pytest.approx(2 / 3), "f1": pytest.approx(2 / 3)}
    three = metrics.classification_metrics(EvalPrediction(np.array([0, 1, 2, 2]), np.array([0, 1, 2, 1])))
    assert three["f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    logits = torch.nn.functional.one_hot(torch.tensor([[1, 2, 3, 0], [1, 1, 1, 1]]), 4).float()
    counts = metrics.count_tokens(logits, torch.tensor([[0, 1, 2, 0], [-100, -100, 1, 2]]))
    assert counts.tolist() == [[2, 3], [1, 2]]
    assert metrics.token_accuracy(EvalPrediction(counts.numpy(), None)) == {"token_accuracy": 3 / 5}


# -- shipped recipes -------------------------------------------------------------------------------------------------

RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT / "recipes")))
def test_a_shipped_recipe_opens_with_its_command_and_parses(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = path.read_text(encoding="utf-8")
    if yaml.safe_load(text)["task"] in ("sft", "dpo"):
        pytest.importorskip("trl")
    words = text.splitlines()[0].removeprefix("# ").split()
    assert words[words.index("train") + 1] == str(path.relative_to(ROOT))
    recipe = load_recipe(path, ["--max_steps", "7", "--use_cpu", "true"])  # bf16 is refused where there is no GPU
    assert recipe.training.max_steps == 7 and recipe.grass is not None
