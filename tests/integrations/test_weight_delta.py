"""`WeightDelta`: a replica that applies the patches has the trainer's plain state dict, bit for bit."""

import copy
import io

import pytest
import torch
import transformers
from helpers import Sequences, tiny_llama
from torch import nn

from grass_hf import GrassConfig, WeightDelta, convert_to_grass, grass_optimizer, restore_model
from grass_hf.optim.delta_apply import apply_patches
from grass_hf.slices.ops.bits import as_bits, pack, positions

SMALL = {"num_attention_heads": 2, "vocab_size": 48, "use_cache": False}


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=48))


def mixtral():
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_key_value_heads": 2}
    config = transformers.MixtralConfig(**shape, **SMALL, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


def opt():
    shape = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 1, "word_embed_proj_dim": 16}
    return transformers.OPTForCausalLM(transformers.OPTConfig(**shape, **SMALL, dropout=0.0))


class Normed(nn.Module):
    """Buffers that training changes, a frozen table and an ordinary parameter."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(48, 16).requires_grad_(False)
        self.inner = nn.Linear(16, 24)
        self.norm = nn.BatchNorm1d(24)
        self.head = nn.Linear(24, 48)

    def forward(self, input_ids, labels):
        hidden = self.norm(self.inner(self.table(input_ids)).flatten(0, 1))
        loss = nn.functional.cross_entropy(self.head(hidden).float(), labels.flatten())
        return type("Output", (), {"loss": loss})


TIED = {"tie_word_embeddings": True}
CASES = {
    "columns": (tiny_llama, {}),
    "rows": (tiny_llama, {"side": "output"}),
    "tied head": (lambda: tiny_llama(**TIED), {"target_modules": "all-matrices"}),
    "tied and ordinary": (lambda: tiny_llama(**TIED), {}),
    "Conv1D": (gpt2, {}),
    "Conv1D, rows": (gpt2, {"side": "output", "target_modules": "all-matrices"}),
    "experts": (mixtral, {}),
    "experts, rows": (mixtral, {"side": "output"}),
    "OPT": (opt, {"target_modules": "all-matrices"}),
    "int8": (tiny_llama, {"weight_dtype": "int8", "side": "output"}),
    "released": (tiny_llama, {"resident": False}),
    "with replacement": (tiny_llama, {"selection": "multinomial_norm"}),
    "rounded to nearest": (tiny_llama, {"rounding": "nearest"}),
    "only slices decay": (tiny_llama, {"decay": "active"}),
    "buffers": (Normed, {}),
    "in turns": (tiny_llama, {"selection": "cycle", "stagger": 1}),
}


class Run:
    """A trainer and a replica."""

    def __init__(self, make=tiny_llama, *, dtype=torch.bfloat16, elements=True, lr=1e-3, weight_decay=0.1, **settings):
        torch.manual_seed(0)
        self.model = make().to(dtype).train()
        convert_to_grass(self.model, GrassConfig(**{"update_interval": 3, "stagger": 2, **settings}))
        self.optimizer = grass_optimizer(self.model, lr=lr, weight_decay=weight_decay)
        self.elements = elements
        self.delta = WeightDelta(self.model, self.optimizer, elements=elements)
        self.replica = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        data = Sequences()
        self.ids = torch.stack([data[i]["input_ids"] for i in range(4)])

    def step(self, times: int = 1):
        for _ in range(times):
            self.model(input_ids=self.ids, labels=self.ids).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def synchronise(self):
        apply_patches(self.replica, self.delta.patches(), self.delta.aliases)
        self.check()
        assert self.delta.last.elements <= self.delta.last.bound

    def check(self):
        now = self.model.state_dict()
        assert now.keys() == self.replica.keys()
        for name, tensor in now.items():
            assert torch.equal(as_bits(tensor), as_bits(self.replica[name])), name


@pytest.mark.parametrize("elements", [True, False], ids=["elements", "all elements"])
@pytest.mark.parametrize("case", CASES)
def test_a_replica_follows(case, elements):
    make, settings = CASES[case]
    run = Run(make, elements=elements, **settings)
    for steps in (1, 1, 2, 4, 1):  # within an interval, over one and over several reselections
        run.step(steps)
        run.synchronise()
    assert not [reason for reason in run.delta.last.whole.values() if "something other" in reason]


@pytest.mark.parametrize("case", ["columns", "rows", "tied head", "Conv1D", "experts", "int8", "buffers"])
def test_columns(case):
    make, settings = CASES[case]
    run = Run(make, elements=False, **settings)
    for steps in (1, 2, 4):
        run.step(steps)
        for name, dim, index, block in run.delta.columns():
            targets = [run.replica[n] for n in (name, *(o for o, f in run.delta.aliases.items() if f == name))]
            for target in targets:
                if dim is None:
                    target.copy_(block)
                elif index.dim() == 1:
                    target.index_copy_(dim, index.long(), block)
                else:
                    target.scatter_(dim, index.long().unsqueeze(-1 if dim == -2 else -2).expand(block.shape), block)
        run.check()


def test_columns_stay_within_the_density():
    run = Run(elements=False, weight_decay=0.0, stagger=1, dtype=torch.float32)
    weights = sum(slice_.weight.numel() for slice_ in _slices(run.model))
    for _ in range(9):
        run.step()
        sent = sum(block.numel() for _, dim, _, block in run.delta.columns() if dim is not None)
        assert sent <= 0.25 * weights
    assert run.delta.step == 9


def _slices(model):
    from grass_hf.convert.record import grass_slices

    return list(grass_slices(model))


def test_elements_are_those_that_changed():
    run = Run(weight_decay=0.0, lr=1e-5, rounding="nearest")
    run.step()
    before = run.replica
    changed = {n: (as_bits(t) != as_bits(before[n])).sum().item() for n, t in run.model.state_dict().items()}
    sent = {name: values.numel() for name, indices, values in run.delta.patches() if indices is not None}
    assert sent == {name: count for name, count in changed.items() if count}
    assert 0 < sum(sent.values()) < 0.1 * sum(tensor.numel() for tensor in before.values())


@pytest.mark.parametrize("lr", [1e-6, 1e-3])
def test_memory_is_at_most_a_bit_for_each_element_of_a_slice(lr):
    run = Run(weight_decay=0.0, rounding="nearest", lr=lr)
    run.step()
    sizes = [(slice_.active.numel(), *slice_.changes.entries) for slice_ in _slices(run.model)]
    most = [-(-size // 8) for size, _ in sizes]
    few = [4 * entry.elements.positions().numel() for _, entry in sizes]
    assert [entry.elements.nbytes for _, entry in sizes] == list(map(min, most, few))
    assert sum(few) < sum(most) if lr < 1e-4 else sum(few) > sum(most)
    run = Run(weight_decay=0.0, elements=False)
    run.step()
    assert all(entry.elements is None for slice_ in _slices(run.model) for entry in slice_.changes.entries)


@pytest.mark.parametrize("targets", ["all-matrices", "all-linear"])
def test_a_tied_head_comes_once(targets):
    run = Run(lambda: tiny_llama(**TIED), target_modules=targets)
    for given in (run.delta.full, run.delta.patches):
        run.step()
        names = [name for name, _, _ in given()]
        assert names.count("model.embed_tokens.weight") == 1 and "lm_head.weight" not in names
        assert run.delta.aliases == {"lm_head.weight": "model.embed_tokens.weight"}


def test_nothing_changed_and_nothing_is_sent():
    run = Run()
    assert list(run.delta.patches()) == []
    run.step()
    run.synchronise()
    assert list(run.delta.patches()) == []


def test_what_was_not_read_to_its_end_comes_again():
    run = Run()
    run.step()
    first = next(run.delta.patches())
    assert run.delta.number == 0 and first[0] == next(run.delta.patches())[0]
    run.step()
    run.synchronise()
    patches = run.delta.patches()
    run.step()
    next(patches)
    run.step()
    with pytest.raises(RuntimeError, match="took step 4 while the changes of step 3"):
        list(patches)


def test_loading_a_state_dict_gives_one_full_patch_and_says_so(caplog):
    run = Run()
    other = {name: tensor + 1 for name, tensor in run.model.state_dict().items()}
    run.step(2)
    run.synchronise()
    run.model.load_state_dict(other)
    run.synchronise()
    assert run.delta.last.is_full and "all weights are sent whole" in caplog.text
    run.step()
    run.synchronise()
    assert not run.delta.last.whole and run.delta.last.elements < 0.3 * sum(t.numel() for t in other.values())


@pytest.mark.parametrize("how", ["in place", "data", "other columns", "frozen"])
def test_an_edit_by_hand_is_sent(how, caplog):
    run = Run(Normed)
    run.step()
    run.synchronise()
    weight = run.model.table.weight if how == "frozen" else run.model.inner.weight
    if how == "data":
        weight.data[0] += 1
    else:
        with torch.no_grad():
            if how == "other columns":  # none that the slice holds: it has nothing to follow
                held = set(run.model.inner.weight_slice.index.tolist())
                weight[:, next(c for c in range(16) if c not in held)] += 1
            else:
                weight += 1
    run.step()
    run.synchronise()
    assert how == "frozen" or "inner.weight" in run.delta.last.whole


def test_restore_sends_everything():
    run = Run(update_interval=200)
    run.step(3)
    restore_model(run.model)
    run.synchronise()
    with torch.no_grad():
        run.model.lm_head.weight += 1
        run.model.model.layers[0].mlp.up_proj.weight += 1
    run.synchronise()
    convert_to_grass(run.model)
    with pytest.raises(RuntimeError, match="was converted anew"):
        next(run.delta.patches())


def test_resume_goes_on_with_the_same_synchronisation():
    run = Run()
    run.step(2)
    run.synchronise()
    run.step()  # not sent when the state is saved
    buffer = io.BytesIO()
    torch.save({"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    for late in (False, True):
        fresh = Run()
        fresh.delta.close()
        fresh.model.load_state_dict(saved["model"])
        if not late:
            fresh.delta = WeightDelta(fresh.model, fresh.optimizer)
        fresh.optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
        if late:
            fresh.delta = WeightDelta(fresh.model, fresh.optimizer)
        assert (fresh.delta.key, fresh.delta.number) == (run.delta.key, 1)
        fresh.replica = {name: tensor.clone() for name, tensor in run.replica.items()}
        fresh.step()
        fresh.synchronise()
        assert not fresh.delta.last.is_full
    # the replica is ahead of the state that is loaded: everything goes
    run.synchronise()
    run.model.load_state_dict(saved["model"])
    run.optimizer.load_state_dict(saved["optimizer"])
    run.synchronise()
    assert run.delta.last.is_full


def test_a_copy_is_not_followed():
    run = Run()
    model, optimizer = copy.deepcopy((run.model, run.optimizer))
    assert all(slice_.changes is None for slice_ in _slices(model)) and model.grass.delta is None
    assert list(WeightDelta(model, optimizer).patches()) == []
    run.step()
    run.synchronise()


def test_what_is_refused():
    run = Run()
    with pytest.raises(ValueError, match="another WeightDelta follows"):
        WeightDelta(run.model, run.optimizer)
    with pytest.raises(ValueError, match="does not drive the slices"):
        WeightDelta(run.model, torch.optim.SGD(run.model.parameters()))
    with pytest.raises(ValueError, match="is not converted"):
        WeightDelta(tiny_llama(), run.optimizer)
    run.step()
    patches = list(run.delta.patches())
    with pytest.raises(ValueError, match="of another model"):
        apply_patches({}, patches)
    wrong = {name: tensor.float() for name, tensor in run.replica.items()}
    with pytest.raises(ValueError, match="does not fit it"):
        apply_patches(wrong, patches)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
def test_bits(count):
    mask = torch.rand(count) < 0.3
    assert torch.equal(positions(pack(mask)), mask.nonzero().squeeze(1))
    assert torch.equal(positions(pack(torch.ones(count, dtype=torch.bool))), torch.arange(count))
