"""Layouts of rows, bad rows, and which tokens are learnt."""

import itertools
import json

import pytest
import recipe_files as files

from grass_hf.recipes import layouts
from grass_hf.recipes.encode import chat_encoder
from grass_hf.recipes.rows import BadRow, place

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
