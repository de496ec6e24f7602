"""Studies of finetuning: a task's own scores, what a method leaves frozen, and tables of them."""

import json
import math

import pytest
import torch
from test_quality import ROOT, study_of
from torch import nn

from grass_hf.measure.bench.methods import make_ready
from grass_hf.recipes.packaged import TEXTS
from grass_hf.recipes.study.evaluation import TaskRows, exact_match
from grass_hf.recipes.study.grid import load_study
from grass_hf.recipes.study.rate_plot import rate_lines
from grass_hf.recipes.study.report import entries, write_report
from grass_hf.recipes.study.rows import deciding
from grass_hf.recipes.study.run import run_row
from grass_hf.recipes.study.text import shared_text

METHODS = {
    "adamw": None,
    "grass": {"settings": {"update_interval": 2}},
    "grass_x3": {"method": "grass", "settings": {"update_interval": 2}, "multipliers": [3.0]},
    "grass_frozen": {"method": "grass", "settings": {"update_interval": 2}, "frozen": "embed_tokens"},
    "lora": {"frozen": "."},
}


@pytest.fixture(scope="module")
def task(document):
    """Word problems that a tiny model learns in a few steps; the text beside them is the other studies'."""
    data = {"dataset": "word-problems", "sequence_length": 64, "max_train_rows": 48, "holdout": 16}
    training = {**document["training"], "max_steps": 4, "bf16": False, "gradient_checkpointing": False}
    general = {"dataset": document["data"]["dataset"], "holdout": 4, "sequence_length": 16, "blocks": 3}
    own = {"evaluations": 2, "exact_match": 3, "general": general, "methods": METHODS}
    own["grid"] = {"learning_rates": [0.01], "multipliers": [1.0]}
    model = {**document["model"], "chat_template": "plain"}
    return {"task": "sft", "model": model, "data": data, "training": training, "study": document["study"] | own}


@pytest.fixture(scope="module")
def rows(task, tmp_path_factory):
    study = study_of(task, tmp_path_factory.mktemp("finetune"))
    return {run.method.name: run_row(run) for run in study.next_runs([])}


def test_every_method_starts_alike_and_says_what_it_learnt_and_forgot(rows):
    assert list(rows) == list(METHODS)
    for name, row in rows.items():
        assert row["loss_before"] == rows["adamw"]["loss_before"], name
        assert row["scores_before"] == rows["adamw"]["scores_before"], name
        assert list(row["scores"]) == ["exact_match", "general_loss"]
        assert row["scores"]["exact_match"] in (0, 1 / 3, 2 / 3, 1)
        assert row["loss"] == row["validation"][-1][1] < row["loss_before"], name
        assert row["scores"]["general_loss"] != row["scores_before"]["general_loss"], name
    assert len({row["loss"] for row in rows.values()}) == len(rows)
    trained = {name: row["trainable"] for name, row in rows.items()}
    # (pieces, width) of the embedding
    assert trained["grass"] - trained["grass_frozen"] == 300 * 32
    # adapters alone, beside all matrices of both layers
    shapes = 2 * [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]
    assert trained["lora"] == sum(4 * (m + n) for m, n in shapes)
    assert len({row["key"] for row in rows.values()}) == len(rows)


def test_tables_and_lines_of_a_task(rows, tmp_path):
    found = {entry.name: entry for entry in entries(rows.values())}
    assert set(found) == set(METHODS)  # a multiplier, or what is frozen, makes another method
    again = [{**row, "learning_rate": 0.02, "loss": row["loss"] + 1} for row in rows.values()]
    both = {entry.name: entry for entry in entries([*rows.values(), *again])}
    loss = rows["lora"]["loss"]
    assert rate_lines(both["lora"]) == [("lora", [0.01, 0.02], [pytest.approx(loss), pytest.approx(loss + 1)])]
    files = write_report([*rows.values(), *again], tmp_path, "tables", "command")
    assert [file.name for file in files] == ["tables.md", "tables.png", "tables_rates.png"]
    text = files[0].read_text()
    assert "| method | perplexity | over seeds | exact match | other text |" in text
    row = rows["adamw"]
    other = math.exp(row["scores"]["general_loss"])
    line = f"| adamw | {row['perplexity']:.2f} | - | {row['scores']['exact_match']:.3f} | {other:.2f} | 1 |"
    assert line in text and "![loss against the learning rate](tables_rates.png)" in text
    assert f"perplexity {math.exp(row['loss_before']):.2f}, exact match" in text


def test_a_classifier_is_compared_by_loss_and_accuracy(document, tmp_path):
    texts = [{"text": f"this is {('good', 'bad')[n % 2]} number {n}", "label": ("yes", "no")[n % 2]} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    made = {**document, "task": "classification"}
    made["data"] = {"dataset": str(tmp_path / "rows.jsonl"), "sequence_length": 32, "holdout": 8}
    made["study"] = {**document["study"], "methods": {"adamw": None, "grass": None}}
    study = study_of(made, tmp_path)
    found = [run_row(run) for run in study.next_runs([])]
    for row in found:
        assert row["evaluated_tokens"] == 8 and 0 <= row["scores"]["accuracy"] <= 1 and row["loss"] > 0
    text = write_report(found, tmp_path, "tables", "command")[0].read_text()
    assert "| method | loss | over seeds | accuracy |" in text and "8 rows, loss 0." in text


def test_a_task_is_evaluated_over_what_is_learnt(task, tmp_path):
    study = study_of(task, tmp_path)
    text = shared_text(study)
    held = text.held_out
    assert isinstance(held, TaskRows) and held.size == sum(
        label != -100 for row in held.rows for label in row["labels"][1:]
    )
    torch.manual_seed(0)
    logits = torch.randn(2, 64, 300)

    class Fixed(nn.Module):
        """Says the same of every batch, whatever it reads."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, attention_mask):
            assert not self.training
            return type("Said", (), {"logits": logits[: len(input_ids), : input_ids.shape[1]]})

    model = Fixed()
    batch = held.collate(held.rows[:2])
    expected = sum(
        float(nn.functional.cross_entropy(logits[n, :-1], row[1:], ignore_index=-100, reduction="sum"))
        for n, row in enumerate(nn.functional.pad(batch["labels"], (0, 64 - batch["labels"].shape[1]), value=-100))
    )
    alone = TaskRows(held.rows[:2], held.collate, 2, held.tokenizer)
    assert alone.evaluate(model) == (pytest.approx(expected / alone.size, rel=1e-5), {}) and model.training


def test_the_exact_match_is_of_the_first_reply_alone(task, tmp_path):
    held = shared_text(study_of(task, tmp_path)).held_out
    said = {}
    for row in held.rows[:3]:
        begin = next(n for n, label in enumerate(row["labels"]) if label != -100)
        said[tuple(row["input_ids"][:begin])] = row["labels"][begin:]

    class Knows(nn.Module):
        """Answers the first two prompts as it should, and the third otherwise."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def generate(self, input_ids, attention_mask, max_new_tokens, do_sample, pad_token_id):
            assert not do_sample and max_new_tokens == max(map(len, said.values()))
            lines = []
            for ids, mask in zip(input_ids, attention_mask, strict=True):
                prompt = tuple(ids[mask.bool()].tolist())
                assert not mask[: len(ids) - len(prompt)].any()  # padded on the left
                reply = list(said[prompt]) if prompt != list(said)[2] else [5, 6]
                lines.append([*ids.tolist(), *reply, *[pad_token_id] * (max_new_tokens - len(reply))])
            return torch.tensor(lines)

    assert exact_match(Knows(), held.rows[:3], held.tokenizer, 2) == 2 / 3
    # what follows the first reply is not asked for
    longer = [{k: [*row[k], *([-100] if k == "labels" else [7]), 9] for k in row} for row in held.rows[:3]]
    assert exact_match(Knows(), longer, held.tokenizer, 3) == 2 / 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"task": "dpo"}, "task=dpo has no study"),
        ({"task": "pretraining"}, "study.exact_match is of task=sft"),
        ({"lora": {"lora_r": 4}}, "remove the section `lora`"),
    ],
)
def test_what_no_study_can_be(task, tmp_path, change, said):
    with pytest.raises(ValueError, match=said):
        study_of({**task, **change}, tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"exact_match": -1}, "study.exact_match=-1 is not a whole number"),
        ({"general": "sotu"}, "study.general='sotu' names no text"),
        ({"methods": {"adamw": {"frozen": "("}}}, "frozen='\\(' is not a valid regular expression"),
    ],
)
def test_what_no_section_can_hold(task, tmp_path, change, said):
    with pytest.raises(ValueError, match=said):
        study_of(task, tmp_path, **change)


def test_what_is_frozen_must_be_there():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"frozen='embed' is found in no parameter's name of Sequential"):
        make_ready("adamw", model, {}, ["0"], "embed")
    assert all(param.requires_grad for param in model.parameters())
    make_ready("adamw", model, {}, ["0"], "weight")
    assert [param.requires_grad for param in model.parameters()] == [False, True]


def test_word_problems_are_right_and_different():
    chats = [row["messages"] for row in TEXTS["word-problems"]()[0]]
    assert len({question["content"] for question, _ in chats}) == len(chats) == 4000
    assert TEXTS["word-problems"]()[0][0]["messages"] == chats[0]
    for question, answer in chats:
        text = question["content"]
        numbers = [int(word.strip(".,")) for word in text.split() if word.strip(".,").isdigit()]
        if "boxes" in text:
            meant = numbers[0] * numbers[1]
        else:
            signs = (1, -1) if "gives" in text else (1, 1, -1)
            meant = sum(sign * number for sign, number in zip(signs, numbers, strict=False))
        assert answer == {"role": "assistant", "content": str(meant)}


def test_shipped_studies_of_finetuning_are_valid():
    paths = sorted((ROOT / "studies").glob("finetune_*.yaml"))
    assert len(paths) == 4
    for path in paths:
        study = load_study(path)
        assert study.finetunes and {"adamw", "lora", "grass"} <= {method.kind for method in study.methods}
        different = {repr((m.kind, deciding(m.kind, m.settings), m.frozen, m.multipliers)) for m in study.methods}
        assert len(different) == len(study.methods)
