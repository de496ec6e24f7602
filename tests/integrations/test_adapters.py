"""Two checkpoints compared, one factored into a LoRA adapter of the other: norms, factors, and logits through PEFT."""

import json
import math
import warnings

import pytest
import torch
from helpers import Sequences, tiny_llama
from peft import PeftConfig, PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
)

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer, restore_model
from grass_hf.cli import main
from grass_hf.convert.conversion import grass_slices
from grass_hf.integrations.adapters import checkpoint, factor
from grass_hf.integrations.adapters.checkpoint import Checkpoint, pair
from grass_hf.integrations.adapters.difference import changes, total
from grass_hf.integrations.adapters.lora import export_adapter

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 2}
# type, settings beside SHAPE: what each is here for
MODELS = {
    "llama": GROUPED,
    "llama_tied": {**GROUPED, "tie_word_embeddings": True},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},  # Conv1D, biases, tied
    "qwen2": {**GROUPED, "tie_word_embeddings": False},  # biases of some linear layers only
    "gemma": {**GROUPED, "head_dim": 8},  # scaled embedding, tied
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},  # positions computed from the mask
    "gpt_neox": {},  # a head that is stored by another name
    "mixtral": {**GROUPED, "num_local_experts": 4},
    "phimoe": {**GROUPED, "num_local_experts": 4},  # routers that are linear layers and return more than their product
    "gpt_oss": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},  # transposed, with biases
}
# What has no place in an adapter of gpt-oss.
PARTLY = {"gpt_oss": ("proj_bias", "sinks")}


def model(name, **options):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.split("_tied")[0], **{**SHAPE, **MODELS[name], **options})
    return AutoModelForCausalLM.from_config(config)


@torch.no_grad()
def changed(model, size=0.05, only="", skip=()):
    """With noise in every parameter whose name contains `only`."""
    for name, parameter in model.named_parameters():
        if only in name and not any(slice_ in name for slice_ in skip):
            parameter += size * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    return model


def save(model, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


def run(capsys, monkeypatch, *words):
    """The command in this process: exit code, what it printed, what it complained about."""
    monkeypatch.setattr("sys.argv", ["grass-hf", *map(str, words)])
    monkeypatch.setenv("COLUMNS", "200")
    capsys.readouterr()
    try:
        main()
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    out, err = capsys.readouterr()
    return code or 0, out, err


def logits(model, tokens):
    return model.eval()(input_ids=tokens).logits.detach()


# ---- diff


@torch.no_grad()
def test_diff_counts_rows_and_columns_and_measures_norms(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_BLOCK", 100)  # several blocks per tensor
    before, after = tiny_llama(), tiny_llama()
    layer = after.model.layers[1]
    layer.self_attn.q_proj.weight[[3, 7]] += 0.5
    layer.mlp.down_proj.weight[:, 5] -= 0.25
    layer.input_layernorm.weight[:4] *= 3
    base = Checkpoint(save(before, tmp_path / "base", max_shard_size="20KB"), "BASE")
    tuned = Checkpoint(save(after, tmp_path / "tuned"), "TUNED")
    assert len(base.files) > 1 and len(tuned.files) == 1
    found = {change.name.removeprefix("model.layers.1."): change for change in changes(base, tuned, pair(base, tuned))}
    assert len(found) == len(before.state_dict())
    q, down, norm = (found.pop(f"{name}.weight") for name in ("self_attn.q_proj", "mlp.down_proj", "input_layernorm"))
    assert (q.rows, q.all_rows, q.columns, q.all_columns) == (2, 32, 32, 32)
    assert (down.rows, down.all_rows, down.columns, down.all_columns) == (32, 32, 1, 48)
    assert (norm.rows, norm.all_rows, norm.columns, norm.all_columns) == (4, 32, 0, 0)
    assert q.change == pytest.approx(0.5 * math.sqrt(2 * 32), rel=1e-6)
    assert q.norm == pytest.approx(before.model.layers[1].self_attn.q_proj.weight.norm().item(), rel=1e-6)
    assert down.change == pytest.approx(0.25 * math.sqrt(32), rel=1e-6)
    assert norm.relative == pytest.approx(2 * 2 / math.sqrt(32), rel=1e-6)
    assert all(change.rows == change.change == change.relative == 0 for change in found.values())
    whole = total([q, down, norm, *found.values()])
    assert whole[0] == pytest.approx(math.sqrt(q.change**2 + down.change**2 + norm.change**2))
    everything = torch.cat([p.flatten() for p in before.parameters()])
    assert whole[1] == pytest.approx(whole[0] / everything.norm().item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_diff_finds_the_rows_that_grass_trained(tmp_path, dtype):
    save(tiny_llama().to(dtype), tmp_path / "base")
    llama = tiny_llama().to(dtype)
    convert_to_grass(llama, GrassConfig(rank=8, side="output", update_interval=2, decay="active"))
    optimizer = grass_optimizer(llama, torch.optim.AdamW, lr=1e-2)
    batch = torch.stack([Sequences()[i]["input_ids"] for i in range(8)])
    trained = {slice_.state.name: set() for slice_ in grass_slices(llama)}
    for _ in range(5):
        for slice_ in grass_slices(llama):
            trained[slice_.state.name] |= set(slice_.index.tolist())
        llama(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save(restore_model(llama), tmp_path / "tuned")
    base, tuned = Checkpoint(tmp_path / "base", "BASE"), Checkpoint(tmp_path / "tuned", "TUNED")
    projections = [change for change in changes(base, tuned, pair(base, tuned)) if "_proj" in change.name]
    assert {change.name.removesuffix(".weight"): change.rows for change in projections} == {
        name: len(rows) for name, rows in trained.items()
    }
    assert len(trained) == 14 and any(8 < change.rows < change.all_rows for change in projections)


def test_diff_of_experts_counts_each_experts_rows(tmp_path):
    from safetensors.torch import save_file

    base = torch.zeros(3, 5, 4)
    tuned = base.clone()
    tuned[0, 1], tuned[2, :, 3] = 1.0, 1.0
    for name, value in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        save_file({"experts": value, "scalar": torch.tensor(1.0)}, tmp_path / name / "model.safetensors")
    old, new = Checkpoint(tmp_path / "base", "BASE"), Checkpoint(tmp_path / "tuned", "TUNED")
    experts, scalar = sorted(changes(old, new, pair(old, new)), key=lambda change: change.name)
    assert (experts.rows, experts.all_rows, experts.columns, experts.all_columns) == (6, 15, 5, 12)
    assert experts.relative == math.inf and (scalar.rows, scalar.all_rows) == (0, 1)


def test_names_are_matched_without_the_base_models_prefix(tmp_path):
    gpt2 = model("gpt2")
    save(gpt2.transformer, tmp_path / "base")  # "h.0.attn..." as the hub's gpt2 is stored
    save(changed(gpt2), tmp_path / "tuned")
    base, tuned = Checkpoint(tmp_path / "base", "BASE"), Checkpoint(tmp_path / "tuned", "TUNED")
    pairs = pair(base, tuned)
    assert pairs.same["transformer.h.0.attn.c_attn.weight"] == "h.0.attn.c_attn.weight"
    assert not pairs.only_base and not pairs.only_tuned
    back = pair(tuned, base)
    assert back.same["h.0.attn.c_attn.weight"] == "transformer.h.0.attn.c_attn.weight"


def test_diff_command_sorts_and_files_its_rows(tmp_path, capsys, monkeypatch):
    base = save(model("llama"), tmp_path / "base")
    tuned = save(
        changed(changed(model("llama"), only="up_proj"), size=0.5, only="1.self_attn.k_proj"), tmp_path / "tuned"
    )
    code, out, _ = run(capsys, monkeypatch, "diff", base, tuned, "--sort", "change", "--json", tmp_path / "rows.json")
    assert code == 0 and "3 of 21 tensors changed" in out
    assert out.index("layers.1.self_attn.k_proj") < out.index("up_proj") and "q_proj" not in out
    row = json.loads((tmp_path / "rows.json").read_text())
    assert len(row["tensors"]) == 21 and row["versions"]["torch"]
    code, out, _ = run(capsys, monkeypatch, "diff", base, tuned, "--all")
    assert code == 0 and out.index("layers.0.mlp.up_proj") < out.index("layers.1.self_attn.k_proj") and "q_proj" in out


# ---- factors


def test_a_few_rows_are_factored_exactly():
    matrix = torch.zeros(40, 30)
    matrix[[1, 5, 9]] = torch.randn(3, 30)
    found = factor.factor(matrix, 8)
    assert found.rank == 3 and found.error < 1e-5
    torch.testing.assert_close(found.left @ found.right, matrix)


def test_a_truncated_product_is_the_closest_one():
    matrix = torch.randn(40, 30)
    singular = torch.linalg.svdvals(matrix.double())
    found = factor.factor(matrix, 8)
    assert found.error == pytest.approx(singular[8:].norm().item(), rel=1e-4)
    assert found.norm == pytest.approx(matrix.norm().item(), rel=1e-5)
    assert (matrix - found.left @ found.right).norm().item() == pytest.approx(found.error, rel=1e-5)


def test_large_matrices_are_factored_at_random_but_alike(monkeypatch):
    spectrum = torch.diag(0.9 ** torch.arange(200.0))
    u, v = (torch.linalg.qr(torch.randn(300, 200))[0] for _ in range(2))
    matrix = u @ spectrum @ v.T
    exact = factor.factor(matrix, 20)
    monkeypatch.setattr(factor, "LARGE", 100)
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda thin, **options: min(thin.shape) <= 36 and svd(thin, **options))
    state = torch.get_rng_state()
    found, again = factor.factor(matrix, 20), factor.factor(matrix, 20)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found.left, again.left) and torch.equal(found.right, again.right)
    assert exact.error <= found.error * (1 + 1e-5) and found.error <= 1.01 * exact.error


# ---- adapters


@pytest.mark.parametrize("name", MODELS)
def test_base_and_a_full_rank_adapter_are_the_tuned_model(name, tmp_path):
    base = save(model(name), tmp_path / "base")
    tuned = save(changed(model(name), skip=PARTLY.get(name, ())), tmp_path / "tuned")
    result = export_adapter(base, tuned, tmp_path / "adapter", rank=64)
    assert not result.left_out and result.error < 1e-5
    tokens = torch.arange(3, 19).reshape(2, 8)
    expected, plain = logits(model_from(tuned), tokens), logits(model_from(base), tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = PeftModel.from_pretrained(model_from(base), tmp_path / "adapter")
    torch.testing.assert_close(logits(adapted, tokens), expected, rtol=1e-4, atol=1e-4)
    assert (plain - expected).abs().max() > 0.1


def model_from(folder, cls=AutoModelForCausalLM):
    return cls.from_pretrained(folder)


def test_merging_gives_the_tuned_weights(tmp_path):
    base, tuned = save(model("llama"), tmp_path / "base"), save(changed(model("llama")), tmp_path / "tuned")
    export_adapter(base, tuned, tmp_path / "adapter", rank=64)
    merged = PeftModel.from_pretrained(model_from(base), tmp_path / "adapter").merge_and_unload()
    expected = model_from(tuned).state_dict()
    assert merged.state_dict().keys() == expected.keys()
    for key, value in merged.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)


def test_a_tied_head_merges_once_if_it_is_left_out_of_the_config(tmp_path):
    base, tuned = save(model("llama_tied"), tmp_path / "base"), save(changed(model("llama_tied")), tmp_path / "tuned")
    export_adapter(base, tuned, tmp_path / "adapter", rank=64)
    config = PeftConfig.from_pretrained(tmp_path / "adapter")
    assert "lm_head" in config.target_modules
    config.target_modules = [name for name in config.target_modules if name != "lm_head"]
    merged = PeftModel.from_pretrained(model_from(base), tmp_path / "adapter", config=config).merge_and_unload()
    for key, value in model_from(tuned).state_dict().items():
        torch.testing.assert_close(merged.state_dict()[key], value, rtol=1e-5, atol=1e-6)


def test_the_reported_error_is_the_distance_of_the_merged_weights(tmp_path):
    base, tuned = save(model("llama"), tmp_path / "base"), save(changed(model("llama")), tmp_path / "tuned")
    errors = []
    for rank in (4, 12):
        result = export_adapter(base, tuned, tmp_path / f"adapter{rank}", rank=rank)
        merged = PeftModel.from_pretrained(model_from(base), tmp_path / f"adapter{rank}").merge_and_unload()
        off, whole = 0.0, 0.0
        plain = model_from(base).state_dict()
        for key, value in model_from(tuned).state_dict().items():
            off += (value - merged.state_dict()[key]).double().square().sum().item()
            whole += (value - plain[key]).double().square().sum().item()
        assert result.error == pytest.approx(math.sqrt(off / whole), rel=1e-3)
        assert result.change == pytest.approx(math.sqrt(whole), rel=1e-4)
        errors.append(result.error)
    assert 0.1 < errors[1] < errors[0] < 1
