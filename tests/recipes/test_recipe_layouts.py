"""Fields of rows and turns: honoured, refused by name, or left out where the recipe says so."""

import pytest
import recipe_tokenizers as tokenizers

from grass_hf.recipes.chats import PLAIN_TEMPLATE, chat_encoder
from grass_hf.recipes.layouts import converter, find_layout
from grass_hf.recipes.places import BadRow


@pytest.mark.parametrize(
    "row, mention",
    [
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0.5}]},
            "weight=0.5",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "b"}]},
            "image",
        ),
        (
            {
                "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
                "images": ["x.png"],
            },
            "images",
        ),
        ({"instruction": "a", "output": "b", "history": [["only one"]]}, "history"),
        ({"instruction": "a", "output": "b", "images": ["x.png"]}, "data.ignore_fields=images"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": "[{"},
            "tools",
        ),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}]}, "no name"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_fields_that_cannot_be_honoured_are_refused_by_name(row, mention):
    layout, names = find_layout("sft", "auto", row, {})
    with pytest.raises(BadRow) as caught:
        converter(layout, names)(row)
    assert mention in str(caught.value)


def test_fields_can_be_ignored_by_name():
    row = {
        "messages": [{"role": "user", "content": "a", "mood": "x"}, {"role": "assistant", "content": "b"}],
        "images": [1],
    }
    layout, names = find_layout("sft", "auto", row, {})
    made = converter(layout, names, ["images", "mood"])(row)
    assert made == {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}}],
        [{"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}],
        [
            {
                "role": "assistant",
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
            }
        ],
    ],
)
def test_every_way_to_write_a_tool_call_becomes_one(turns):
    (turn,) = converter("messages", {"messages": "messages"})({"messages": turns})["messages"]
    assert turn["content"] == "" and turn["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}


@pytest.mark.parametrize(
    "field, weight", [({"weight": 0}, 0), ({"train": False}, 0), ({"loss": True}, 1), ({"weight": None}, None)]
)
def test_weights_are_kept_whatever_they_are_called(field, weight):
    row = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", **field}]}
    turn = converter("sharegpt", {"conversations": "conversations"})(row)["messages"][1]
    assert turn == {"role": "assistant", "content": "b"} | ({} if weight is None else {"weight": weight})


def test_replies_in_a_prompt_are_not_learnt():
    prompt = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    row = {"prompt": prompt, "completion": [{"role": "assistant", "content": "d"}]}
    layout, names = find_layout("sft", "auto", row, {})
    made = converter(layout, names)(row)
    assert made == {"messages": [*prompt, {"role": "assistant", "content": "d"}], "given": 3}
    tokenizer = tokenizers.byte_level(chat=PLAIN_TEMPLATE)
    for loss_on, learnt in (("replies", "d"), ("everything", "### User:\na")):
        ids, mask = chat_encoder(tokenizer, loss_on, None)(made)
        text = tokenizer.decode([token for token, on in zip(ids, mask, strict=True) if on])
        assert text.startswith(learnt)
