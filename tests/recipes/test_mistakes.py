"""What a newcomer gets wrong: each mistake is one sentence that says what to write, with exit code 2."""

from __future__ import annotations

import copy

import pytest
import recipe_files

# A name for the mistake, what to put into the recipe (path of keys, value), and words of the sentence.
MISTAKES = [
    ("target_modules with commas", ("training", "optim_args"), "target_modules=q_proj,v_proj", "semicolons"),
    ("a learning rate in optim_args", ("training", "optim_args"), "lr=1e-3", "--learning_rate"),
    ("weight decay in optim_args", ("training", "optim_args"), "rank=4,weight_decay=0.1", "--weight_decay"),
    ("a list where a name belongs", ("task",), ["sft"], "task"),
    ("null where a name belongs", ("task",), None, "task"),
    ("a task that does not exist", ("task",), "finetune", "task"),
    ("a section that does not exist", ("trainning",), {"max_steps": 3}, "training"),
    ("a field that does not exist", ("training", "learning_rat"), 1e-3, "learning_rate"),
    ("a rank of zero", ("grass", "rank"), 0, "rank"),
    ("a density above one", ("grass", "density"), 4, "density"),
    ("rank and density", ("grass", "rank"), 8, "density"),
    ("an interval of zero", ("grass", "update_interval"), 0, "update_interval"),
    ("a rule that does not exist", ("grass", "selection"), "topk", "top_r"),
    ("a side that does not exist", ("grass", "side"), "rows", "output"),
    ("a field of Grass that does not exist", ("grass", "interval"), 5, "update_interval"),
    ("modules that the model does not have", ("grass", "target_modules"), ["query_key_value"], "query_key_value"),
    ("a base optimizer that does not exist", ("grass", "base"), "adamw_8bit_torch", "grass.base"),
    ("a list where a path belongs", ("model", "config_name"), ["a", "b"], "config_name"),
    ("a model that is not there", ("model", "config_name"), "no/such/model.json", "no/such/model.json"),
    ("a file that is not there", ("data", "dataset"), "no/such/rows.jsonl", "no/such/rows.jsonl"),
    ("a negative length", ("data", "sequence_length"), -1, "sequence_length"),
    ("text where a number belongs", ("training", "max_steps"), "many", "max_steps"),
    ("a batch of nothing", ("training", "per_device_train_batch_size"), 0, "per_device_train_batch_size"),
    ("a metric that does not exist", ("evaluation", "metrics"), ["acuracy"], "acuracy"),
    ("a mapping where texts belong", ("evaluation", "prompts"), {"first": "The car"}, "prompts"),
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return recipe_files.pretraining(tmp_path_factory.mktemp("recipe"))


@pytest.mark.parametrize(
    ("keys", "value", "words"), [case[1:] for case in MISTAKES], ids=[case[0] for case in MISTAKES]
)
def test_a_mistake_is_one_sentence(keys, value, words, recipe, tmp_path, monkeypatch, capsys):
    wrong = copy.deepcopy(recipe)
    if keys == ("training", "optim_args"):  # the settings are said there instead of in a section
        del wrong["grass"]
        wrong["training"]["optim"] = "grass"
    section = wrong
    for key in keys[:-1]:
        section = section[key]
    section[keys[-1]] = value
    before = sorted(path.name for path in tmp_path.iterdir())
    file = recipe_files.write(tmp_path, wrong)
    code = recipe_files.grass(monkeypatch, "validate", file)
    said = capsys.readouterr().err.strip().splitlines()
    assert code == 2, said
    (sentence,) = [line for line in said if line.startswith("grass-hf: ")]
    assert words in sentence and sentence[-1] in ".?", sentence
    assert sorted(path.name for path in tmp_path.iterdir()) == [*before, file.name]


def test_there_are_twenty_five():
    assert len(MISTAKES) == 25
