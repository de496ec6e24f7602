"""Wrong recipes, files and flags: a sentence each, and nothing is written."""

import os

import pytest
import recipe_files as files


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
