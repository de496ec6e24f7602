"""Tiny runs of `grass-hf train`, every task: what they leave behind, and what training has changed."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import recipe_files as files
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

pytest.importorskip("datasets")

from grass_hf import MuonAdamW
from grass_hf.convert.conversion import grass_slices
from grass_hf.optim.driving import plain_class
from grass_hf.recipes import runner
from grass_hf.recipes.models import load_model
from grass_hf.recipes.parse import load_recipe
from grass_hf.recipes.runner import train
from grass_hf.recipes.tasks import build_trainer, prepare

ROOT = Path(__file__).parents[2]


def run(folder, recipe, *flags, **options):
    """The results of a recipe, and the entries of its training.jsonl."""
    loaded = load_recipe(files.write(folder, recipe), flags)
    results = train(loaded, **options)
    lines = (Path(loaded.training.output_dir) / "training.jsonl").read_text().splitlines()
    return results, [json.loads(line) for line in lines]


def test_pretraining_leaves_a_plain_model_a_log_and_a_report(tmp_path, monkeypatch, capsys):
    path = files.write(tmp_path, files.pretraining(tmp_path))
    assert files.grass(monkeypatch, "train", path, "--json", tmp_path / "results" / "run.json") == 0
    out = capsys.readouterr().out
    assert "one example:" in out and "generated: The car" in out
    found = json.loads((tmp_path / "results" / "run.json").read_text())
    assert found["results"]["loss after"] < found["results"]["loss before"] - 0.1
    assert found["results"]["token_accuracy after"] > found["results"]["token_accuracy before"]
    assert out.splitlines()[-1] == (
        f"perplexity: untrained {found['results']['perplexity before']:.1f}, "
        f"trained {found['results']['perplexity after']:.1f}"
    )
    assert found["recipe"]["grass"]["density"] == 0.25 and found["memory"]["process"] > 1e6
    entries = [json.loads(line) for line in (tmp_path / "out" / "training.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert any("grass/coverage" in entry for entry in entries)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == len(tokenizer)
    page = (tmp_path / "out" / "report.html").read_text()
    for mention in ("<svg", "coverage", "full AdamW", "model.layers.*.mlp.gate_proj", "The car", "update_interval: 2"):
        assert mention in page
    assert not re.search(r'(src|href)="(?!#)', page)  # nothing to fetch

    # a second run does not write over the first, unless it is told to
    assert files.grass(monkeypatch, "train", path) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert files.grass(monkeypatch, "train", path, "--overwrite", "--max_steps", "1", "--no-grass") == 0
    assert "grass/coverage" not in (tmp_path / "out" / "training.jsonl").read_text()


@pytest.mark.parametrize("task", ["pretraining", "finetuning", "classification", "preferences"])
def test_the_base_optimizer_of_the_section_grass_steps(tmp_path, monkeypatch, task):
    recipe, made = getattr(files, task)(tmp_path), []
    recipe["grass"]["base"] = "muon"
    recipe["training"]["max_steps"] = 2
    build = runner.build_trainer
    monkeypatch.setattr(runner, "build_trainer", lambda *args: made.append(build(*args)) or made[0])
    run(tmp_path, recipe, json_file=tmp_path / "run.json")
    assert json.loads((tmp_path / "run.json").read_text())["recipe"]["grass"]["base"] == "muon"
    optimizer = getattr(made[0].optimizer, "optimizer", made[0].optimizer)
    assert plain_class(optimizer) is MuonAdamW and optimizer.grass.step == 2
    assert ", muon, 2 steps" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("task", ["pretraining", "finetuning", "classification", "preferences"])
def test_adapters_in_place_of_grass_leave_the_weights_alone(tmp_path, task):
    recipe = getattr(files, task)(tmp_path)
    if task == "pretraining":
        recipe["model"] = {"model_name_or_path": str(files.causal_folder(tmp_path / "model"))}
    folder = Path(recipe["model"]["model_name_or_path"])
    del recipe["grass"]
    recipe["lora"] = {"lora_r": 4, "lora_dropout": 0.0}
    recipe["training"]["max_steps"] = 2
    before = load_file(folder / "model.safetensors")
    run(tmp_path, recipe, "--lora_alpha", "16")
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["lora_dropout"]) == (4, 16, 0.0)
    kinds = {"classification": AutoModelForSequenceClassification}
    base = kinds.get(task, AutoModelForCausalLM).from_pretrained(folder)
    model = PeftModel.from_pretrained(base, tmp_path / "out")
    changed = [name for name, p in model.named_parameters() if "lora_B" in name and p.abs().sum() > 0]
    assert changed and not (tmp_path / "out" / "model.safetensors").exists()
    kept = load_file(folder / "model.safetensors")
    assert all(torch.equal(before[name], kept[name]) for name in before)


def test_a_stream_trains_like_the_rows(tmp_path):
    recipe = files.pretraining(tmp_path)
    recipe["data"] |= {"streaming": True, "holdout": 6}
    results, _ = run(tmp_path, recipe)
    assert results["loss after"] < results["loss before"] - 0.1 and results["steps"] == 6


def test_resumed_is_uninterrupted(tmp_path):
    recipe = files.pretraining(tmp_path)
    recipe["training"] |= {"save_strategy": "steps", "save_steps": 3}
    run(tmp_path, recipe)
    start = str(tmp_path / "out" / "checkpoint-3")
    run(tmp_path, recipe, "--resume_from_checkpoint", start, "--output_dir", str(tmp_path / "again"))
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_checkpoint_without_grass_is_refused(tmp_path, monkeypatch, capsys):
    recipe = files.pretraining(tmp_path)
    recipe["training"] |= {"save_strategy": "steps", "save_steps": 3}
    path = files.write(tmp_path, recipe)
    assert files.grass(monkeypatch, "train", path, "--no-grass", "--max_steps", "3") == 0
    flags = ["--resume_from_checkpoint", tmp_path / "out" / "checkpoint-3", "--output_dir", tmp_path / "other"]
    assert files.grass(monkeypatch, "train", path, *flags) == 2
    assert "was not written by a Grass run" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_the_best_checkpoint_is_what_is_left(tmp_path):
    recipe = files.pretraining(tmp_path)
    recipe["training"] |= {
        "max_steps": 12,
        "weight_decay": 0.5,
        "learning_rate": 1.0,  # soon worse than at the start
        "lr_scheduler_type": "constant",
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "perplexity",
        "greater_is_better": False,
    }
    recipe["evaluation"]["early_stopping_patience"] = 3
    recipe["grass"]["stagger"] = 1
    results, entries = run(tmp_path, recipe)
    *entries, last = [entry for entry in entries if "eval_perplexity" in entry]  # the last is of what is left
    measured = {entry["step"]: entry["eval_perplexity"] for entry in entries if entry["step"]}
    best = min(measured, key=measured.get)
    assert results["best checkpoint"].endswith(f"checkpoint-{best}")
    assert results["steps"] == best + 3 < 12  # stopped early
    kept, final = (
        load_file(path / "model.safetensors") for path in (Path(results["best checkpoint"]), tmp_path / "out")
    )
    assert all(torch.equal(kept[name], final[name]) for name in kept)
    assert results["perplexity after"] == last["eval_perplexity"] == pytest.approx(measured[best])


def test_bad_rows_can_be_left_out_and_are_counted(tmp_path, monkeypatch, capsys):
    recipe = files.pretraining(tmp_path)
    lines = (tmp_path / "texts.jsonl").read_text().splitlines()
    (tmp_path / "texts.jsonl").write_text("\n".join([*lines, '{"text": null}', '{"text": " "}']) + "\n")
    recipe["data"]["bad_rows"] = "skip"
    assert files.grass(monkeypatch, "validate", files.write(tmp_path, recipe), "--no-memory") == 0
    out = capsys.readouterr().out
    assert f"1 bad rows left out, the first: {tmp_path / 'texts.jsonl'}, line 61: text is missing" in out


@pytest.mark.parametrize("suffix", ["csv", "parquet", "txt", "json"])
def test_files_of_every_kind(tmp_path, suffix, monkeypatch, capsys):
    from datasets import Dataset

    recipe = files.pretraining(tmp_path)
    (tmp_path / "rows").mkdir()
    for part, texts in (("train", files.sentences(90)), ("test", files.sentences(30))):
        path = str(tmp_path / "rows" / f"{part}.{suffix}")
        rows = Dataset.from_dict({"text": texts})
        if suffix == "csv":
            rows.to_csv(path, index=False)
        elif suffix == "parquet":
            rows.to_parquet(path)
        elif suffix == "txt":
            Path(path).write_text("\n".join(texts))
        else:
            Path(path).write_text(json.dumps([{"text": text} for text in texts]))
    recipe["data"] |= {"dataset": str(tmp_path / "rows"), "sequence_length": 16}
    assert files.grass(monkeypatch, "validate", files.write(tmp_path, recipe), "--no-memory") == 0
    out = capsys.readouterr().out
    assert "(evaluation)" in out and "examples" in out


def test_classification_learns_and_reports_accuracy_and_f1(tmp_path):
    recipe = files.classification(tmp_path)
    # with batches of 4 it is a matter of the seed whether 80 steps are enough, whatever the settings of Grass
    recipe["training"] |= {"max_steps": 80, "per_device_train_batch_size": 16}
    results, _ = run(tmp_path, recipe)
    assert results["accuracy after"] == 1.0 > results["accuracy before"]
    assert 0 <= results["f1 after"] <= 1
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "cold", 1: "warm"}


def test_finetuning_learns_the_replies_only(tmp_path):
    pytest.importorskip("trl")
    recipe = files.finetuning(tmp_path)
    loaded = load_recipe(files.write(tmp_path, recipe))
    prepared = prepare(loaded)
    trainer = build_trainer(loaded, prepared, load_model(loaded, prepared.config))
    batch = next(iter(trainer.get_train_dataloader()))
    row = batch["labels"][0]
    text = prepared.tokenizer.decode(row[row != -100])
    assert "It is " in text and "You are welcome." in text and "Which" not in text and "Thank you" not in text
    assert trainer.model.grass.config.density == 0.25 and list(grass_slices(trainer.model))

    results, entries = run(tmp_path, recipe)
    assert results["loss after"] < results["loss before"] - 0.1 and "perplexity after" in results
    assert any("grass/coverage" in entry for entry in entries)


def test_finetuning_with_the_tied_head_compressed(tmp_path):
    """TRL's loss reads the head's weight without calling it: the same loss is made of the model's own logits then."""
    pytest.importorskip("trl")
    recipe = files.finetuning(tmp_path)
    files.causal_folder(tmp_path / "model", tie_word_embeddings=True)
    recipe["grass"]["target_modules"] = "all-matrices"
    results, entries = run(tmp_path, recipe)
    assert results["loss after"] < results["loss before"] - 0.1
    assert 0 < results["mean_token_accuracy after"] < 1
    _, usual = run(tmp_path, recipe, "--target_modules", "all-linear", "--output_dir", str(tmp_path / "usual"))
    for name in ("loss", "eval_loss"):  # of the first step, and before it
        mine, other = (next(e[name] for e in log if name in e) for log in (entries, usual))
        assert mine == pytest.approx(other, abs=1e-3 if name == "eval_loss" else 1e-5)


def test_trl_with_a_compressed_head_is_refused(tmp_path, monkeypatch, capsys):
    pytest.importorskip("trl")
    recipe = files.preferences(tmp_path)
    files.causal_folder(tmp_path / "model", tie_word_embeddings=True)
    recipe["grass"]["target_modules"] = "all-matrices"
    assert files.grass(monkeypatch, "train", files.write(tmp_path, recipe)) == 2
    error = capsys.readouterr().err
    assert "reads the weights of model.embed_tokens" in error and "exclude_modules=['model.embed_tokens']" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("precompute", [False, True])
def test_preferences_are_learnt_and_the_reference_stays(tmp_path, precompute):
    pytest.importorskip("trl")
    recipe = files.preferences(tmp_path)
    recipe["training"] |= {"precompute_ref_log_probs": precompute, "max_steps": 12}
    loaded = load_recipe(files.write(tmp_path, recipe))
    prepared = prepare(loaded)
    model = load_model(loaded, prepared.config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = build_trainer(loaded, prepared, model)
    reference = trainer.ref_model
    assert precompute or not hasattr(reference, "grass")
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert log[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # policy = reference: -log(1/2)
    assert log[-1]["loss"] < 0.68
    if reference is not None:
        assert all(torch.equal(tensor.cpu(), before[name]) for name, tensor in reference.state_dict().items())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items() if name in before)


def test_evaluation_before_training_leaves_two_ranks_together(tmp_path):
    """Trainer.evaluate() marks a model as prepared without DDP, and train() would leave it so."""
    launch = pytest.importorskip("launch")
    done = launch.well(launch.torchrun(2, "evaluate_first.py", str(tmp_path)))
    assert "world 2 wrapped True same True" in done.stdout


def test_two_processes_under_accelerate(tmp_path):
    recipe = files.pretraining(tmp_path)
    recipe["grass"]["score_by"] = "sequence"
    path = files.write(tmp_path, recipe)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", str(random.randint(20000, 40000)), "-m", "grass_hf", "train", str(path)]
    flags = ["--per_device_train_batch_size", "2", "--json", str(tmp_path / "two.json")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *flags], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "two.json").read_text())
    assert done.stdout.count("generated: The car") == 1  # one process speaks
    assert found["results"]["tokens"] == 6 * 2 * 2 * 32  # steps x examples x processes x tokens
    one, _ = run(tmp_path, recipe, "--output_dir", str(tmp_path / "one"))
    assert found["results"]["loss after"] == pytest.approx(one["loss after"], abs=1e-4)
