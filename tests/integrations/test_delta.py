"""Deltas of checkpoints: both ways byte for byte, small where little changed, and refused for any other base."""

import json
import math

import pytest
import torch
from helpers import tiny_llama
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_adapters import run, save

from grass_hf.integrations.adapters import delta
from grass_hf.integrations.adapters.stored import read_header


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folders(tmp_path):
    """A base, a tuned model with two rows and a column and a norm changed, and their delta."""
    llama = tiny_llama(hidden_size=64, intermediate_size=96).to(torch.bfloat16)
    base = save(llama, tmp_path / "base", max_shard_size="100KB")
    with torch.no_grad():
        llama.model.layers[0].self_attn.q_proj.weight[[3, 7]] += 0.5
        llama.model.layers[1].mlp.down_proj.weight[:, [5, 90]] -= 0.25
        llama.model.norm.weight += 1
    llama.config.max_position_embeddings = 77
    tuned = save(llama, tmp_path / "tuned")
    (tuned / "training_args.bin").write_bytes(b"not of the model")
    (base / "README.md").write_text("a model card")
    return base, tuned, tmp_path / "change.safetensors"


def test_both_ways_byte_for_byte(folders, tmp_path, capsys, monkeypatch):
    base, tuned, file = folders
    code, out, err = run(
        capsys, monkeypatch, "delta", "save", base, tuned, "--output", file, "--json", tmp_path / "row"
    )
    assert code == 0, err
    row = json.loads((tmp_path / "row").read_text())
    assert row["axes"] == {"same": 18, "rows": 1, "columns": 1, "all": 1, "new": 0}
    assert row["nbytes"] == file.stat().st_size and f"{row['nbytes'] / row['full']:.2%} of the checkpoint" in out
    apply, revert = (["delta", verb, source, file, "--output"] for verb, source in (("apply", base), ("revert", tuned)))
    assert run(capsys, monkeypatch, *apply, tmp_path / "applied")[0] == 0
    assert run(capsys, monkeypatch, *revert, tmp_path / "reverted")[0] == 0
    expected = contents(tuned)
    del expected["training_args.bin"]
    assert contents(tmp_path / "applied") == expected
    assert contents(tmp_path / "reverted") == contents(base)


def test_only_the_changed_lines_are_stored(folders):
    base, tuned, file = folders
    delta.save(base, tuned, file)
    stored = load_file(file)
    shapes = sorted(tuple(value.shape) for key, value in stored.items() if key[0].isdigit())
    # two rows of 64, two columns of 64, a norm, and the lines' indices
    assert shapes == [(1, 64, 1), (2,), (2,), (2, 64), (2, 64)]
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata()["format"] == "grass-hf delta 1"
    rest = sum(value.nbytes for key, value in stored.items() if not key[0].isdigit())
    assert sum(value.nbytes for value in stored.values()) - rest == 2 * (64 + 4 * 64) + 4 * 4


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn]
)
def test_every_dtype_shape_and_bit(dtype, tmp_path):
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randint(0, 2, shape, generator=generator).to(dtype)

    base = {
        "matrix": drawn(9, 7),
        "experts": drawn(3, 20, 16),
        "vector": drawn(11),
        "scalar": drawn(),
        "none": drawn(0, 4),
    }
    tuned = {name: value.clone() for name, value in base.items()}
    tuned["matrix"] = 1 - base["matrix"].int()
    tuned["matrix"] = tuned["matrix"].to(dtype)
    flipped = base["experts"].clone()
    flipped[0, 3] = flipped[2, 4] = drawn(16)
    tuned["experts"] = flipped
    tuned["scalar"] = torch.zeros(()).to(dtype)
    tuned["vector"] = torch.cat([drawn(1), base["vector"][1:]])
    if dtype.is_floating_point and dtype.itemsize > 1:
        tuned["matrix"][0, :3] = torch.tensor([math.nan, -0.0, math.inf])
        base["matrix"][0, :3] = torch.tensor([math.nan, 0.0, -math.inf])
    check_round_trip(base, tuned, tmp_path)


def test_tensors_of_one_side_only(tmp_path):
    base = {
        "same": torch.ones(4, 4),
        "gone": torch.randn(3, 3),
        "recast": torch.randn(5, 5),
        "grown": torch.randn(6, 2),
    }
    tuned = {"same": base["same"], "new": torch.randn(2, 8).half(), "recast": base["recast"].half()}
    tuned["grown"] = torch.cat([base["grown"], torch.zeros(1, 2)])
    saved = check_round_trip(base, tuned, tmp_path)
    assert saved.axes == {"same": 1, "rows": 0, "columns": 0, "all": 0, "new": 3}


def check_round_trip(base, tuned, folder):
    for name, tensors in (("base", base), ("tuned", tuned)):
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt", "side": name})
        (folder / name / "empty.txt").write_bytes(b"" if name == "base" else b"not")
    saved = delta.save(folder / "base", folder / "tuned", folder / "delta")
    load_file(folder / "delta")  # aligned and complete for others, too
    delta.apply(folder / "base", folder / "delta", folder / "applied")
    delta.apply(folder / "tuned", folder / "delta", folder / "reverted", back=True)
    assert contents(folder / "applied") == contents(folder / "tuned")
    assert contents(folder / "reverted") == contents(folder / "base")
    return saved


def test_a_base_in_other_shards_serves_too(folders, tmp_path):
    base, tuned, file = folders
    delta.save(base, tuned, file)
    one = save(tiny_llama(hidden_size=64, intermediate_size=96).to(torch.bfloat16), tmp_path / "one")
    for name in ("README.md", "config.json", "generation_config.json"):
        (one / name).write_bytes((base / name).read_bytes())
    delta.apply(one, file, tmp_path / "applied")
    assert (tmp_path / "applied" / "model.safetensors").read_bytes() == (tuned / "model.safetensors").read_bytes()


def test_another_checkpoint_is_refused_and_nothing_written(folders, tmp_path, capsys, monkeypatch):
    base, tuned, file = folders
    delta.save(base, tuned, file)
    llama = tiny_llama(hidden_size=64, intermediate_size=96).to(torch.bfloat16)
    with torch.no_grad():
        llama.lm_head.weight[0, 0] += 1  # a tensor that tuning did not change
    other = save(llama, tmp_path / "other")
    narrow = save(tiny_llama(num_hidden_layers=1), tmp_path / "narrow")
    edited = save(tiny_llama(hidden_size=64, intermediate_size=96).to(torch.bfloat16), tmp_path / "edited")
    (edited / "generation_config.json").write_text("{}")
    data = file.read_bytes()
    damaged, cut, foreign, evil = (tmp_path / name for name in ("damaged", "cut", "foreign", "evil"))
    start = 8 + len(read_header(file).encode())
    spot = data.index(load_file(file)[first_bits(file)].numpy().tobytes(), start)
    damaged.write_bytes(data[:spot] + bytes([data[spot] ^ 1]) + data[spot + 1 :])
    cut.write_bytes(data[:-8])
    save_file({"a": torch.ones(1)}, foreign)
    manifest = json.loads(safe_open(file, framework="pt").metadata()["manifest"])
    manifest["tuned"]["files"]["../owned"] = manifest["tuned"]["files"].pop("config.json")
    save_file(load_file(file), evil, metadata={"format": "grass-hf delta 1", "manifest": json.dumps(manifest)})
    cases = [
        (["apply", other, file], "lm_head.weight has other values", "give that one"),
        (["apply", narrow, file], "BASE=", "that the delta was made with"),
        (["apply", tuned, file], "is the tuned checkpoint already", ""),
        (["revert", base, file], "is the base checkpoint already", ""),
        (["apply", edited, file], "generation_config.json is not the file", "give that checkpoint"),
        (["apply", base, damaged], "is damaged at", "copy it again"),
        (["apply", base, cut], "no complete delta", "copy it again"),
        (["apply", base, foreign], "no complete delta", "grass-hf delta save"),
        (["apply", base, evil], "outside its folder", "do not use it"),
        (["apply", base, tmp_path / "nowhere"], "is not a file", "grass-hf delta save"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for words, *sentences in cases:
        code, _, err = run(capsys, monkeypatch, "delta", *words, "--output", tmp_path / "out")
        assert code == 2 and all(sentence in err for sentence in sentences), (words, err)
    code, _, err = run(capsys, monkeypatch, "delta", "apply", base, file, "--output", base, "--overwrite")
    assert code == 2 and "is or holds" in err
    assert sorted(tmp_path.rglob("*")) == before


def first_bits(file):
    return next(name for name in load_file(file) if name.endswith(".bits"))
