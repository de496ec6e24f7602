"""Tiny runs of reward, kto and grpo, and streams of several files: TRL's trainers with Grass as the optimizer."""

import json
from pathlib import Path

import pytest
import recipe_files as files
import torch
import vllm_stand_in
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

pytest.importorskip("trl")

from grass_hf.recipes.parse import load_recipe
from grass_hf.recipes.runner import train
from grass_hf.recipes.tasks import prepare

REWARDS = """
def counted(completions, answer, **columns):
    assert all(isinstance(each, str) for each in answer) and {"prompts", "kind"} <= set(columns)
    return [float(_text(said).count("r")) for said in completions]


def _text(said):
    return said if isinstance(said, str) else said[-1]["content"]
"""


def turns(question, answer=None):
    asked = [{"role": "user", "content": question}]
    return asked if answer is None else [{"role": "assistant", "content": answer}]


def rewarding(tmp_path, **data):
    """A recipe for grpo, with its reward function beside it."""
    (tmp_path / "counting.py").write_text(REWARDS)
    rows = [{"question": f"Which {n}?", "answer": str(n), "kind": "x"} for n in range(24)]
    files.write_lines(tmp_path / "asked.jsonl", rows)
    said = files.preferences(tmp_path) | {"task": "grpo"}
    said["data"] |= {"dataset": str(tmp_path / "asked.jsonl"), "columns": {"prompt": "question"}}
    said["data"] |= {"reward_funcs": ["counting.counted"], **data}
    said["training"] |= {"num_generations": 4, "max_completion_length": 6, "per_device_eval_batch_size": 4}
    return said


def results(tmp_path, said, *flags):
    found = train(load_recipe(files.write(tmp_path, said), flags), overwrite=True)
    lines = (tmp_path / "out" / "training.jsonl").read_text().splitlines()
    return found, [entry for entry in map(json.loads, lines) if "grad_norm" in entry]


def test_a_reward_model_learns_to_rank(tmp_path):
    said = files.preferences(tmp_path) | {"task": "reward"}
    pairs = [
        {"prompt": turns(f"q{n}"), "chosen": turns("", " red."), "rejected": turns("", " white.")} for n in range(40)
    ]
    pairs.append(pairs[0] | {"chosen": turns("", "long " * 200)})
    files.write_lines(tmp_path / "pairs.jsonl", pairs)
    loaded = load_recipe(files.write(tmp_path, said))
    prepared = prepare(loaded)
    assert prepared.train.empty + prepared.evaluation.empty == 1  # TRL would drop it without a word
    said["training"]["max_steps"] = 10
    found, steps = results(tmp_path, said)
    assert steps[-1]["loss"] < 0.5 < steps[0]["loss"] and found["accuracy after"] == 1
    assert all(0 < entry["grass/coverage"] <= 1 for entry in steps)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.num_labels == 1
    red, white = (
        model(
            **prepared.tokenizer(
                prepared.tokenizer.apply_chat_template(turns("q") + turns("", answer), tokenize=False),
                return_tensors="pt",
            )
        ).logits
        for answer in (" red.", " white.")
    )
    assert red.item() > white.item()


def test_kto_learns_from_answers_without_pairs(tmp_path):
    said = files.preferences(tmp_path) | {"task": "kto"}
    path = tmp_path / "liked.csv"
    path.write_text(
        "prompt,completion,label\n" + "".join(f"The {n} is,{' red' if n % 2 else ' None'},{n % 2}\n" for n in range(40))
    )
    said["data"]["dataset"] = str(path)
    said["training"]["max_steps"] = 12
    _, steps = results(tmp_path, said)
    assert steps[0]["loss"] == pytest.approx(0.5, abs=1e-3)  # policy = reference
    assert steps[-1]["rewards/margins"] > 0.5 and all(0 < entry["grass/coverage"] <= 1 for entry in steps)


def test_kto_takes_pairs_apart(tmp_path):
    said = files.preferences(tmp_path) | {"task": "kto"}
    said["training"]["max_steps"] = 1
    found, steps = results(tmp_path, said)
    assert found["steps"] == 1 and steps[0]["loss"] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_grpo_is_driven_by_a_function_beside_the_recipe(tmp_path, system):
    said = rewarding(tmp_path, system_prompt=system)
    before = load_file(tmp_path / "model" / "model.safetensors")
    said["training"]["max_steps"] = 3
    found, steps = results(tmp_path, said)
    assert (
        found["steps"] == 3
        and "reward after" in found
        and "rewards/counted/mean" in steps[0]
        and steps[0]["grass/coverage"] > 0
    )
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before if "q_proj" in name)
    first = prepare(load_recipe(files.write(tmp_path, said))).train.first()
    assert isinstance(first["prompt"], list) == (system is not None) and first["kind"] == "x"


def test_grpo_sends_a_server_what_changed(tmp_path, monkeypatch):
    """The rehearsal asks it for nothing; before and after training it is sent everything."""
    said = rewarding(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    server = vllm_stand_in.Server(model, "sparse_nccl")
    vllm_stand_in.use(monkeypatch, server)
    said["training"] |= {"max_steps": 3, "use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": server.url}
    said["training"] |= {"vllm_importance_sampling_correction": False}
    try:
        results(tmp_path, said)
    finally:
        server.close()
    total = sum(weight.numel() for weight in server.model.parameters())
    assert len(server.syncs) >= 3 and sum(0 < count < total for count in server.syncs) >= 2
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(weight, after[name]) for name, weight in server.model.named_parameters())


@pytest.mark.parametrize(
    "data, training, mention",
    [
        ({"reward_funcs": ["counting.nothing"]}, {}, "counting.nothing cannot be imported"),
        ({"reward_funcs": ["counted"]}, {}, "counted cannot be imported"),
        ({"reward_funcs": []}, {}, "data.reward_funcs is missing"),
        ({"sequence_length": 6}, {}, "leaves no room for a prompt"),
        ({}, {"num_generations": 3}, "num_generations"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_recipe_for_grpo_gets_a_sentence(tmp_path, monkeypatch, capsys, data, training, mention):
    said = rewarding(tmp_path, **data)
    said["training"] |= training
    assert files.grass(monkeypatch, "train", files.write(tmp_path, said)) == 2
    assert mention in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [{"loss_type": "dft"}, {"label_smoothing_factor": 0.2}, {"packing": True}, {"padding_free": True}],
    ids=lambda options: next(iter(options)),
)
def test_a_head_that_is_compressed_has_the_losses_that_are_asked_for(tmp_path, options):
    said = files.finetuning(tmp_path)
    said["training"] |= {"max_steps": 1, **options}
    losses = {}
    for targets in ("all-linear", "all-matrices"):
        said["grass"]["target_modules"] = targets
        losses[targets] = results(tmp_path, said)[1][0]["loss"]
    assert losses["all-matrices"] == pytest.approx(losses["all-linear"], abs=1e-5)
    plain = files.finetuning(tmp_path)
    plain["training"]["max_steps"] = 1
    same = results(tmp_path, plain)[1][0]["loss"] == pytest.approx(losses["all-linear"], abs=1e-5)
    assert same == ("padding_free" in options)


def test_fields_that_a_task_does_not_read_are_refused(tmp_path):
    for name, value in (("loss_on", "everything"), ("labels", ["a"]), ("reward_funcs", ["a.b"])):
        said = files.preferences(tmp_path)
        said["data"][name] = value
        with pytest.raises(ValueError, match=rf"data\.{name} is of .* has no effect on task=dpo"):
            load_recipe(files.write(tmp_path, said))


@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_streams_of_several_files_with_weights(tmp_path, task):
    said = files.finetuning(tmp_path) if task == "sft" else files.preferences(tmp_path)
    path = Path(said["data"]["dataset"])
    lines = path.read_text().splitlines()
    half = path.with_name("more.jsonl")
    half.write_text("\n".join(lines[:20]))
    said["data"] |= {"dataset": [str(path), str(half)], "weights": [1, 2], "streaming": True, "holdout": 2}
    found, steps = results(tmp_path, said)
    assert found["steps"] == 6 and all(torch.isfinite(torch.tensor(entry["loss"])) for entry in steps)


def test_a_bad_row_of_a_stream_is_named_when_it_is_read(tmp_path):
    said = files.finetuning(tmp_path, [*files.chats(9), {"messages": []}, *files.chats(9)])
    said["data"] |= {"streaming": True, "holdout": 2}
    with pytest.raises(ValueError, match=r"chats\.jsonl, line 10: messages is \[\] and not a list of turns"):
        results(tmp_path, said)
    with pytest.warns(UserWarning, match=r"left out: .*line 10"):
        assert results(tmp_path, said, "--bad_rows", "skip")[0]["steps"] == 6
