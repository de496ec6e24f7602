"""What `validate` passes, `train` finishes; what it refuses, `train` refuses: mutated recipes go through both."""

import contextlib
import io

import pytest
import recipe_files as files

pytest.importorskip("datasets")
pytest.importorskip("trl")

PRE, SFT, DPO, CLASS = files.pretraining, files.finetuning, files.preferences, files.classification
EVAL = {"eval_strategy": "steps", "eval_steps": 1}
BEST = {**EVAL, "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}
# (recipe, {section: fields}); a section None is taken out
MUTATIONS = {
    "smoothing": (PRE, {"training": {"label_smoothing_factor": 0.1}}),
    "accumulation": (PRE, {"training": {"gradient_accumulation_steps": 3}}),
    "best perplexity": (PRE, {"training": {**BEST, "metric_for_best_model": "perplexity"}}),
    "best of nothing": (PRE, {"training": {**BEST, "metric_for_best_model": "accuracy"}}),
    "early stopping": (PRE, {"training": BEST, "evaluation": {"early_stopping_patience": 1}}),
    "early stopping alone": (PRE, {"training": EVAL, "evaluation": {"early_stopping_patience": 1}}),
    "early stopping, no evaluation": (PRE, {"evaluation": {"early_stopping_patience": 1}}),
    "wsd": (PRE, {"training": {"lr_scheduler_type": "warmup_stable_decay"}}),
    "wsd, told": (
        PRE,
        {"training": {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 2}}},
    ),
    "plateau": (PRE, {"training": {"lr_scheduler_type": "reduce_lr_on_plateau", **EVAL}}),
    "plateau, no evaluation": (PRE, {"training": {"lr_scheduler_type": "reduce_lr_on_plateau"}}),
    "scheduler, wrong word": (PRE, {"training": {"lr_scheduler_kwargs": {"minimum": 1}}}),
    "polynomial": (PRE, {"training": {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1.0}}}),
    "nothing held out": (PRE, {"data": {"holdout": 0}}),
    "nothing held out, evaluated": (PRE, {"data": {"holdout": 0}, "training": EVAL}),
    "a stream": (PRE, {"data": {"streaming": True, "holdout": 4}}),
    "a stream without evaluation": (PRE, {"data": {"streaming": True, "holdout": 0}}),
    "epochs": (PRE, {"training": {"max_steps": -1, "num_train_epochs": 0.2}}),
    "no steps": (PRE, {"training": {"max_steps": -1, "num_train_epochs": 0}}),
    "no batch": (PRE, {"training": {"per_device_train_batch_size": 0}}),
    "adafactor": (PRE, {"training": {"optim": "adafactor"}}),
    "sgd": (PRE, {"training": {"optim": "sgd"}}),
    "fused": (PRE, {"training": {"optim": "adamw_torch_fused"}}),
    "muon": (PRE, {"grass": {"base": "muon"}}),
    "an optimizer that is not installed": (PRE, {"training": {"optim": "stable_adamw"}}),
    "in full": (PRE, {"grass": None}),
    "bf16 evaluation": (PRE, {"training": {"bf16_full_eval": True, **EVAL}}),
    "in bf16": (PRE, {"training": {"bf16": True}}),
    "bf16 weights": (PRE, {"model": {"dtype": "bfloat16"}}),
    "eager": (PRE, {"model": {"attn_implementation": "eager"}}),
    "no such attention": (PRE, {"model": {"attn_implementation": "flash_attention_9"}}),
    "batch_eval_metrics": (PRE, {"training": {"batch_eval_metrics": True}}),
    "checkpointing": (PRE, {"training": {"gradient_checkpointing": True}}),
    "neftune": (SFT, {"training": {"neftune_noise_alpha": 5.0}}),
    "dft": (SFT, {"training": {"loss_type": "dft"}}),
    "no such loss": (SFT, {"training": {"loss_type": "best"}}),
    "smoothed chats": (SFT, {"training": {"label_smoothing_factor": 0.1}}),
    "packed": (SFT, {"training": {"packing": True}}),
    "packed and generated": (SFT, {"training": {"packing": True}, "evaluation": {"metrics": ["rouge"]}}),
    "generated": (SFT, {"training": EVAL, "evaluation": {"metrics": ["rouge"], "generated_rows": 2}}),
    "liger": (SFT, {"training": {"use_liger_kernel": True}}),
    "all matrices": (SFT, {"grass": {"target_modules": "all-matrices"}}),
    "short": (SFT, {"data": {"sequence_length": 8}}),
    "lora": (SFT, {"grass": None, "lora": {"lora_r": 2}}),
    "ipo": (DPO, {"training": {"loss_type": ["ipo"]}}),
    "no such preference": (DPO, {"training": {"loss_type": ["best"]}}),
    "precomputed": (DPO, {"training": {"precompute_ref_log_probs": True}}),
    "too short for the prompts": (DPO, {"data": {"sequence_length": 2}}),
    "best margins": (DPO, {"training": {**BEST, "metric_for_best_model": "rewards/margins"}}),
    "best of nothing in pairs": (DPO, {"training": {**BEST, "metric_for_best_model": "f1"}}),
    "f1": (CLASS, {"evaluation": {"metrics": ["f1"]}, "training": {**BEST, "metric_for_best_model": "f1"}}),
    "accuracy unmeasured": (
        CLASS,
        {"evaluation": {"metrics": ["f1"]}, "training": {**BEST, "metric_for_best_model": "accuracy"}},
    ),
    "smoothed classes": (CLASS, {"training": {"label_smoothing_factor": 0.1}}),
    "frozen by mistake": (CLASS, {"grass": {"exclude_modules": "all-linear"}}),
}
# In every run of the tests: one of each kind, those that were once passed and then failed first.
SAMPLE = (
    "early stopping alone",
    "wsd",
    "best of nothing",
    "best perplexity",
    "nothing held out, evaluated",
    "a stream",
    "generated",
    "no such preference",
    "too short for the prompts",
    "f1",
)


def outcome(monkeypatch, command, path, *words):
    """The exit code; 1 for an exception of another package."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            return files.grass(monkeypatch, command, path, *words)
        except Exception:
            return 1


@pytest.mark.parametrize(
    "name", [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow) for name in MUTATIONS]
)
def test_validate_and_train_agree(name, tmp_path, monkeypatch, capsys):
    make, changes = MUTATIONS[name]
    said = make(tmp_path)
    said["training"]["max_steps"] = 3
    for section, fields in changes.items():
        if fields is None:
            del said[section]
        else:
            said[section] = {**said.get(section, {}), **fields}
    path = files.write(tmp_path, said)
    passed = outcome(monkeypatch, "validate", path, "--no-memory")
    assert not (tmp_path / "out").exists()
    told = capsys.readouterr().err
    trained = outcome(monkeypatch, "train", path)
    assert (passed == 0) == (trained == 0), (passed, trained, told, capsys.readouterr().err)
    if passed:
        assert passed == 2 and told.strip().splitlines()[-1].startswith("grass-hf: ")
        assert not list(tmp_path.glob("out/*.safetensors"))
