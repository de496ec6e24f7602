"""Chats in the real templates of models, with tokenizers of their kinds: what is trained, and what is learnt of it."""

import itertools

import pytest
import recipe_tokenizers as tokenizers
from recipe_tokenizers import CHATML

pytest.importorskip("trl")

from grass_hf.recipes.chats import chat_encoder
from grass_hf.recipes.encode import PLAIN_TEMPLATE
from grass_hf.recipes.places import BadRow

CHAT = [
    {"role": "user", "content": "first question?"},
    {"role": "assistant", "content": "one answer."},
    {"role": "user", "content": "second question?"},
    {"role": "assistant", "content": "another  answer é."},
]
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Bonn", "days": None}}}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}
CALLING = [
    {"role": "user", "content": "weather?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "get_weather", "content": "rain"},
    {"role": "assistant", "content": "It rains."},
]
# Those without a reply of plain text in every turn, or for pictures only.
ODD = ("diffusion_gemma", "idefics3", "llava_next", "smolvlm", "qwen2_5_vl", "qwen3_vl", "lfm2_2_5_vl")
NAMES = sorted(path.stem for path in tokenizers.TEMPLATES.glob("*.jinja") if not path.stem.endswith("_training"))


def made(chat, kind="byte_level"):
    if kind == "sentencepiece":
        return tokenizers.sentencepiece(chat)
    return tokenizers.byte_level(("<|im_start|>", "<|im_end|>", "<bos>"), chat=chat, bos_token="<bos>")


def learnt(tokenizer, ids, mask):
    """The runs of tokens that are learnt, as texts."""
    groups = itertools.groupby(zip(ids, mask, strict=True), lambda pair: pair[1])
    return [tokenizer.decode([token for token, _ in group]) for on, group in groups if on]


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ODD])
def test_replies_are_learnt_in_every_template_of_trls(name, kind):
    tokenizer = made(tokenizers.template(name), kind)
    encode = chat_encoder(tokenizer, "replies", None)
    try:
        ids, mask = encode({"messages": CHAT})
    except BadRow as error:  # none is known to TRL, and the template rewrites earlier turns: said in one sentence
        assert encode.template is None and "rewrites earlier turns" in str(error)
        return
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, chat_template=encode.template)
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    replies = learnt(tokenizer, ids, mask)
    for turn in CHAT:
        inside = [turn["content"] in " ".join(replies), *(turn["content"][:6] in reply for reply in replies)]
        assert any(inside) if turn["role"] == "assistant" else not any(inside)
    for reply, other in ((0, 1), (1, 0)):
        assert CHAT[2 * other + 1]["content"] not in replies[reply]


def test_every_turn_of_qwen3_is_learnt_although_its_template_rewrites_them():
    tokenizer = made(tokenizers.template("qwen3"))
    ids, mask = chat_encoder(tokenizer, "replies", None)({"messages": CHAT})
    empty = "<think>\n\n</think>\n\n"
    assert learnt(tokenizer, ids, mask) == [f"{empty}one answer.<|im_end|>\n", f"{empty}another  answer é.<|im_end|>\n"]
    ids, mask = chat_encoder(tokenizer, "everything", None)({"messages": CHAT})
    assert all(mask) and tokenizer.decode(ids) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    ids, mask = chat_encoder(tokenizer, "last_reply", None)({"messages": CHAT})
    assert learnt(tokenizer, ids, mask) == [f"{empty}another  answer é.<|im_end|>\n"]


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@pytest.mark.parametrize("chat", [CHATML, PLAIN_TEMPLATE], ids=["chatml", "plain"])
def test_templates_without_marks_learn_what_comes_after_the_prompt(kind, chat):
    tokenizer = made(chat, kind)
    ids, mask = chat_encoder(tokenizer, "replies", None)({"messages": CHAT})
    assert ids == tokenizer(tokenizer.apply_chat_template(CHAT, tokenize=False), add_special_tokens=False)["input_ids"]
    end = "<|im_end|>\n" if chat is CHATML else f"{tokenizer.eos_token}\n\n"
    found = learnt(tokenizer, ids, mask)
    assert [text.strip() for text in found] == [(CHAT[at]["content"] + end).strip() for at in (1, 3)]


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1", "glm4moe"])
def test_tool_calls_and_tools_are_rendered_and_learnt(name):
    tokenizer = made(tokenizers.template(name))
    ids, mask = chat_encoder(tokenizer, "replies", None)({"messages": CALLING, "tools": [TOOL]})
    replies = "".join(learnt(tokenizer, ids, mask))
    assert "get_weather" in replies and "Bonn" in replies and "It rains." in replies and "rain\n" not in replies
    assert "parameters" in tokenizer.decode(ids)


@pytest.mark.parametrize(
    "row, mention",
    [
        ({"messages": CALLING}, "tool_calls"),
        ({"messages": CHAT, "tools": [TOOL]}, "the row has tools"),
        ({"messages": [CHAT[0], CHAT[1] | {"reasoning_content": "because"}]}, "reasoning_content='because'"),
        ({"messages": [CHAT[0], CHAT[1] | {"reasoning_content": "one"}]}, "reasoning_content='one'"),
        ({"messages": [CHAT[0], CHAT[1] | {"audio": "a.wav"}]}, "audio='a.wav'"),
        ({"messages": [CHAT[0] | {"name": "Ann"}, CHAT[1]]}, "name='Ann'"),
        ({"messages": [CHAT[0] | {"weight": 1}, CHAT[1]]}, "weight"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_template_leaves_out_is_refused_by_name(row, mention):
    with pytest.raises(BadRow, match=r"leaves out|learns replies") as caught:
        chat_encoder(made(CHATML), "replies", None)(row)
    assert mention in str(caught.value)


def test_a_system_turn_that_a_template_drops_is_refused():
    without = "{% for m in messages if m['role'] != 'system' %}" + CHATML.split("%}", 1)[1]
    for said in ("Be brief.", "s"):
        with pytest.raises(BadRow, match="turn 1, of the system, has content="):
            chat_encoder(made(without), "replies", said)({"messages": CHAT})


@pytest.mark.parametrize("name", ["chatml", "qwen2_5", "phi3"])
@pytest.mark.parametrize("loss_on", ["replies", "everything"])
def test_weights_of_turns(name, loss_on):
    if (name, loss_on) == ("phi3", "everything"):
        pytest.skip("TRL's marks are for replies; its own template ends every chat with another token: refused")
    tokenizer = made(CHATML if name == "chatml" else tokenizers.template(name))
    chat = [*CHAT[:1], CHAT[1] | {"weight": 0}, CHAT[2], CHAT[3] | {"weight": 1}]
    ids, mask = chat_encoder(tokenizer, loss_on, None)({"messages": chat})
    plain, _ = chat_encoder(tokenizer, loss_on, None)({"messages": CHAT})
    text = "".join(learnt(tokenizer, ids, mask))
    assert ids == plain and "one answer" not in text and "another  answer é." in text
    assert ("first question?" in text) == (loss_on == "everything")


def test_reasoning_is_learnt_where_the_template_has_a_place_for_it():
    tokenizer = made(tokenizers.template("qwen3"))
    chat = [CHAT[0], CHAT[1] | {"reasoning_content": "because"}, *CHAT[2:]]
    ids, mask = chat_encoder(tokenizer, "replies", None)({"messages": chat})
    assert "<think>\nbecause\n</think>\n\none answer." in learnt(tokenizer, ids, mask)[0]


def test_a_chat_that_begins_with_a_reply_learns_it_without_its_header():
    tokenizer = made(CHATML)
    ids, mask = chat_encoder(tokenizer, "replies", None)({"messages": CHAT[1:]})
    assert learnt(tokenizer, ids, mask) == ["one answer.<|im_end|>\n", "another  answer é.<|im_end|>\n"]


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_prompt_and_completion_are_one_text(kind):
    tokenizer = made(None, kind)
    ids, mask = chat_encoder(tokenizer, "replies", None)({"prompt": "The river", "completion": "bank is red."})
    assert ids == [*tokenizer("The riverbank is red.")["input_ids"], tokenizer.eos_token_id]
    assert tokenizer.decode([i for i, on in zip(ids, mask, strict=True) if on]).startswith(("bank", "rbank", "erbank"))
    with pytest.raises(BadRow, match=r"data\.system_prompt"):
        chat_encoder(tokenizer, "replies", "Be brief.")({"prompt": "a", "completion": "b"})


def test_replies_behind_the_cut_are_not_looked_for():
    tokenizer, long = made(CHATML), [*CHAT * 30]
    ids, mask = chat_encoder(tokenizer, "replies", None)({"messages": long})
    rendered, render = [], tokenizer.apply_chat_template
    tokenizer.apply_chat_template = lambda turns, **options: rendered.append(turns) or render(turns, **options)
    cut_ids, cut_mask = chat_encoder(tokenizer, "replies", None, 100)({"messages": long})
    assert cut_ids == ids and cut_mask[:100] == mask[:100] and len(rendered) < 16
