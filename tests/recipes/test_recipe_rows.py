"""Real kinds of files through `grass-hf train`: what was trained, token by token, beside a reading of its own."""

import csv
import json
from pathlib import Path

import pytest
import recipe_files as files
import recipe_tokenizers as tokenizers
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

pytest.importorskip("trl")

from grass_hf.recipes import runner
from grass_hf.recipes.parse import load_recipe
from grass_hf.recipes.tasks import prepare


def folder(path, tokenizer, **options):
    """A tiny LLaMA with a tokenizer."""
    torch.manual_seed(0)
    shape = files.LLAMA | {"vocab_size": len(tokenizer), "max_position_embeddings": 1024, **options}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def recipe(tmp_path, task, data, model, **training):
    said = files.pretraining(tmp_path) | {"task": task, "model": {"model_name_or_path": model}, "evaluation": {}}
    said["data"] = {"sequence_length": 256, "holdout": 0} | data
    said["evaluation"] = {"before_training": False, "report": False}
    said["training"] |= {"max_steps": 2, "per_device_train_batch_size": 4, **training}
    return said


def trained(tmp_path, monkeypatch, said, *flags):
    """Rows (tokens, labels) of one epoch of what the trainer trains on, as sets; the run itself is done too."""
    built, build = [], runner.build_trainer
    monkeypatch.setattr(runner, "build_trainer", lambda *args: built.append(build(*args)) or built[-1])
    runner.train(load_recipe(files.write(tmp_path, said), flags), overwrite=True)
    found = []
    for batch in built[-1].get_train_dataloader():
        masks = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        for ids, mask, labels in zip(batch["input_ids"], masks, batch["labels"], strict=True):
            kept = mask.bool()
            found.append((tuple(ids[kept].tolist()), tuple(labels[kept].tolist()) if labels.ndim else labels.item()))
    return found


def test_a_csv_of_news(tmp_path, monkeypatch):
    """Quotes, commas and line ends in cells; a class called None, another called NA."""
    rows = [(f'Shares, "up" {n}\nin London', ("None", "NA", "sport")[n % 3]) for n in range(12)]
    with (tmp_path / "news.csv").open("w", newline="", encoding="utf-8-sig") as lines:
        csv.writer(lines).writerows([("article", "category"), *rows])
    data = {"dataset": str(tmp_path / "news.csv"), "columns": {"text": "article", "label": "category"}}
    tokenizer = tokenizers.byte_level()
    said = recipe(tmp_path, "classification", data, folder(tmp_path / "m", tokenizer, pad_token_id=1))
    found = trained(tmp_path, monkeypatch, said, "--num_train_epochs", "1")
    own = AutoTokenizer.from_pretrained(tmp_path / "m")
    classes = sorted({label for _, label in rows})
    assert sorted(found) == sorted((tuple(own(text)["input_ids"]), classes.index(label)) for text, label in rows)
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["id2label"] == {"0": "NA", "1": "None", "2": "sport"}


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_questions_and_answers_in_jsonl(tmp_path, monkeypatch, kind):
    rows = [{"question": f"Ann has {n} eggs, how many?", "answer": f"She has {n}. \u2028\n#### {n}"} for n in range(8)]
    (tmp_path / "gsm.jsonl").write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    tokenizer = getattr(tokenizers, kind)()
    data = {"dataset": str(tmp_path / "gsm.jsonl"), "columns": {"prompt": "question", "completion": "answer"}}
    found = trained(tmp_path, monkeypatch, recipe(tmp_path, "sft", data, folder(tmp_path / "m", tokenizer)))
    assert {own(tokenizer, row["question"], row["answer"]) for row in rows} == set(found)


def own(tokenizer, prompt, answer):
    """Tokens and labels by the plainest way: a label where a token's text reaches into the answer."""
    made = tokenizer(prompt + answer, return_offsets_mapping=True)
    ids = [*made["input_ids"], tokenizer.eos_token_id]
    ends = [*(end for _, end in made["offset_mapping"]), len(prompt) + 1]
    return tuple(ids), tuple(i if end > len(prompt) else -100 for i, end in zip(ids, ends, strict=True))


def test_sharegpt_with_tool_calls(tmp_path, monkeypatch):
    """LLaMA-Factory's way to write calls, in Qwen's template; the arguments differ from row to row."""
    rows = []
    for n in range(6):
        arguments = {"city": f"Bonn{n}"} if n % 2 else {"days": n, "unit": None}
        turns = [
            {"from": "human", "value": f"weather {n}?"},
            {"from": "function_call", "value": json.dumps({"name": "get_weather", "arguments": arguments})},
            {"from": "observation", "value": "rain"},
            {"from": "gpt", "value": f"It rains {n}."},
        ]
        tools = [{"name": "get_weather", "description": f"d{n}", "parameters": {"type": "object"}}]
        rows.append({"conversations": turns, "tools": json.dumps(tools), "system": "Be brief."})
    files.write_lines(tmp_path / "calls.jsonl", rows)
    special = ("<|im_start|>", "<tool_call>", "</tool_call>")
    tokenizer = tokenizers.byte_level(special, eos="<|im_end|>", chat=tokenizers.template("qwen2_5"))
    said = recipe(
        tmp_path,
        "sft",
        {"dataset": str(tmp_path / "calls.jsonl"), "sequence_length": 1024},
        folder(tmp_path / "m", tokenizer),
    )
    found = trained(tmp_path, monkeypatch, said)
    expected = set()
    for row in rows:
        tools, turns = json.loads(row["tools"]), row["conversations"]
        pieces = [
            ("<|im_start|>system\nBe brief.\n\n# Tools\n\nYou may call one or more functions ", 0),
            ("to assist with the user query.", 0),
            ("\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>\n", 0),
            (json.dumps({"type": "function", "function": tools[0]}), 0),
            ("\n</tools>\n\nFor each function call, return a json object with function name and arguments within ", 0),
            ('<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, ', 0),
            ('"arguments": <args-json-object>}', 0),
            (f"\n</tool_call><|im_end|>\n<|im_start|>user\n{turns[0]['value']}<|im_end|>\n<|im_start|>assistant", 0),
            (f"\n<tool_call>\n{turns[1]['value']}\n</tool_call><|im_end|>\n", 1),
            ("<|im_start|>user\n<tool_response>\nrain\n</tool_response><|im_end|>\n<|im_start|>assistant", 0),
            (f"\n{turns[3]['value']}<|im_end|>\n", 1),
        ]
        text = "".join(piece for piece, _ in pieces)
        marks = "".join(str(on) * len(piece) for piece, on in pieces)
        made = tokenizer(text, return_offsets_mapping=True)
        labels = (
            i if "1" in marks[a:b] else -100
            for i, (a, b) in zip(made["input_ids"], made["offset_mapping"], strict=True)
        )
        expected.add((tuple(made["input_ids"]), tuple(labels)))
    assert set(found) == expected


def test_pretraining_trains_every_token_of_every_document(tmp_path, monkeypatch):
    texts = [" ".join(files.sentences()[n : n + n % 7 + 1]) for n in range(60)]
    files.write_lines(tmp_path / "docs.jsonl", [{"text": text} for text in texts])
    tokenizer = tokenizers.byte_level()
    said = recipe(
        tmp_path,
        "pretraining",
        {"dataset": str(tmp_path / "docs.jsonl"), "sequence_length": 64},
        folder(tmp_path / "m", tokenizer),
    )
    found = trained(tmp_path, monkeypatch, said)
    stream = [token for text in texts for token in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
    blocks = [tuple(stream[at : at + 64]) for at in range(0, len(stream), 64)]
    assert sorted(found) == sorted((block, block) for block in blocks) and len(blocks[-1]) < 64


# -- files ------------------------------------------------------------------------------------------------------------


def chats(path, name, answers):
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": a}]} for a in answers]
    files.write_lines(path / name, rows)


@pytest.fixture
def model(tmp_path):
    return str(files.causal_folder(tmp_path / "model", max_position_embeddings=512))


def prepared(tmp_path, model, data, task="sft"):
    return prepare(load_recipe(files.write(tmp_path, recipe(tmp_path, task, data, model))))


def replies(prepared, part="train"):
    rows = getattr(prepared, part).dataset
    said = [
        prepared.tokenizer.decode([i for i in row["labels"] if i != -100], skip_special_tokens=True) for row in rows
    ]
    return [text.strip() for text in said]


def test_hidden_files_and_metadata_are_no_rows_and_splits_are_found(tmp_path, model):
    data = tmp_path / "data"
    chats(data, "train.jsonl", ["a", "b"])
    chats(data, ".ipynb_checkpoints/train-checkpoint.jsonl", ["old"])
    chats(data, "__pycache__/x.jsonl", ["cached"])
    chats(data, "validation.jsonl", ["v"])
    chats(data, "test.jsonl", ["t"])
    (data / "dataset_infos.json").write_text("{}")
    (data / ".cache.csv").write_text("x\n1\n")
    found = prepared(tmp_path, model, {"dataset": str(data)})
    assert replies(found) == ["a", "b"] and replies(found, "evaluation") == ["v"]
    found = prepared(tmp_path, model, {"dataset": str(data), "eval_split": "test", "split": "train[:1]"})
    assert replies(found) == ["a"] and replies(found, "evaluation") == ["t"]
    found = prepared(tmp_path, model, {"dataset": str(data), "split": "train+test[:1]"})
    assert replies(found) == ["a", "b", "t"] and replies(found, "evaluation") == ["v"]
    with pytest.raises(ValueError, match="no split 'dev': it has train, validation, test"):
        prepared(tmp_path, model, {"dataset": str(data), "eval_split": "dev"})


def test_files_of_several_kinds_are_not_half_read(tmp_path, model):
    chats(tmp_path / "data", "a.jsonl", ["a"])
    (tmp_path / "data" / "b.csv").write_text("messages\nx\n")
    with pytest.raises(ValueError, match=r"several kinds, and those with \.csv would not be read"):
        prepared(tmp_path, model, {"dataset": str(tmp_path / "data")})
    assert replies(prepared(tmp_path, model, {"dataset": str(tmp_path / "data" / "*.jsonl")})) == ["a"]
    (tmp_path / "tables").mkdir()
    for name in ("a.csv", "b.tsv"):
        (tmp_path / "tables" / name).write_text("text\nx\n")
    with pytest.raises(ValueError, match=r"those with \.tsv would not be read"):
        prepared(tmp_path, model, {"dataset": str(tmp_path / "tables")})


@pytest.mark.parametrize(
    "name, content, mention",
    [
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.jsonl", b'{"messages": []}\n{"messages"\n', "a.jsonl, line 2: not valid JSON"),
        ("a.csv", "messages\ncaf\xe9\n".encode("latin-1"), "a.csv: 'utf-8' codec can't decode"),
        ("a.csv", b'messages,b\n"x\ny",1\na,b,c\n', "a.csv, line 4: 3 fields under 2 headings"),
    ],
)
def test_files_that_cannot_be_read_are_named_with_the_line(tmp_path, model, name, content, mention):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        prepared(tmp_path, model, {"dataset": str(tmp_path / name)})
    assert mention in str(caught.value)


def test_several_datasets_of_different_layouts_and_weights(tmp_path, model):
    chats(tmp_path, "a [1].jsonl", ["a"] * 30)
    files.write_lines(tmp_path / "b.jsonl", [{"instruction": "q", "output": "b"}] * 30)
    several = {"dataset": [str(tmp_path / "a [1].jsonl"), str(tmp_path / "b.jsonl")]}
    found = prepared(tmp_path, model, several)
    assert replies(found) == ["a"] * 30 + ["b"] * 30 and found.layout == "messages, alpaca"
    said = replies(prepared(tmp_path, model, several | {"weights": [3, 1]}))
    assert 0.15 < said.count("b") / len(said) < 0.4 and said.count("b") >= 30
    with pytest.raises(ValueError, match=r"data\.weights=\[1\.0\] does not fit the 2 datasets"):
        prepared(tmp_path, model, several | {"weights": [1]})


def test_a_row_that_the_template_refuses_is_named_or_counted(tmp_path):
    tokenizer = tokenizers.byte_level(chat=tokenizers.template("gemma"), bos_token="<|endoftext|>")
    where = folder(tmp_path / "m", tokenizer)
    chats(tmp_path, "rows.jsonl", ["a", "b"])
    bad = {"messages": [{"role": role, "content": "x"} for role in ("user", "user", "assistant")]}
    with (tmp_path / "rows.jsonl").open("a") as lines:
        lines.write("\n" + json.dumps(bad) + "\n")
    data = {"dataset": str(tmp_path / "rows.jsonl"), "holdout": 1}
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 4: the chat template refuses the chat: .*must alternate"):
        prepared(tmp_path, where, data)
    with (tmp_path / "rows.jsonl").open("a") as lines:
        lines.write(json.dumps(bad | {"messages": []}) + "\n")
    for _ in range(2):  # from the cache the second time
        found = prepared(tmp_path, where, data | {"bad_rows": "skip", "holdout": 0})
        assert len(found.train.dataset) == 2 and len(found.train.bad) == 2
        assert all(f"line {at}" in note for at, note in zip((4, 5), found.train.bad, strict=True))


def test_what_decides_about_tokens_decides_about_the_cache(tmp_path, model):
    files.write_lines(tmp_path / "docs.jsonl", [{"text": "The car is red."}] * 40)
    data, path = {"dataset": str(tmp_path / "docs.jsonl"), "sequence_length": 32}, Path(model) / "tokenizer_config.json"
    ends = []
    for end in ("<|endoftext|>", "!"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": end}))
        found = prepared(tmp_path, model, data, "pretraining")
        ends.append(found.tokenizer.decode(found.train.dataset[0]["input_ids"]).count("red." + end))
    assert min(ends) > 1


def test_stars_are_classes_by_name_and_positions_are_positions(tmp_path):
    encoder = str(files.encoder_folder(tmp_path / "encoder"))
    for suffix in ("csv", "jsonl"):
        for labels, values, numbers in (
            (["1", "2", "3", "4", "5"], [1, 4, 5], [0, 3, 4]),
            (["bad", "good"], [0, 1, 1], [0, 1, 1]),
            ([], [1, 10, 2], [0, 2, 1]),
        ):
            path = tmp_path / f"stars.{suffix}"
            if suffix == "csv":
                path.write_text("text,label\n" + "".join(f"text,{value}\n" for value in values))
            else:
                files.write_lines(path, [{"text": "text", "label": value} for value in values])
            found = prepared(
                tmp_path, encoder, {"dataset": str(path), "labels": labels, "sequence_length": 32}, "classification"
            )
            assert list(found.train.dataset["labels"]) == numbers, (suffix, labels)


def test_long_rows_are_cut_and_counted(tmp_path, model):
    chats(tmp_path, "rows.jsonl", ["short", "a long answer " * 20])
    found = prepared(tmp_path, model, {"dataset": str(tmp_path / "rows.jsonl"), "sequence_length": 48})
    assert found.train.cut == 1 and max(map(len, found.train.dataset["input_ids"])) == 48
    said = recipe(tmp_path, "sft", {"dataset": str(tmp_path / "rows.jsonl"), "sequence_length": 48}, model)
    said["training"]["truncation_mode"] = "keep_end"
    kept = prepare(load_recipe(files.write(tmp_path, said))).train.dataset[1]["input_ids"]
    assert found.tokenizer.decode(kept).rstrip().endswith(found.tokenizer.eos_token)
