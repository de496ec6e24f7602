"""What FSDP2 must do, case by case, under torchrun over gloo; test_fsdp.py runs it and reads "ok CASE".

sharded_cases.py RANKS CASE...
"""

from __future__ import annotations

import contextlib
import copy
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "support"), str(Path(__file__).parents[3])]

import model_matrix
import torch
import torch.distributed as dist
from helpers import VOCABULARY, leave, tiny_llama
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from grass_hf import GrassConfig, MuonAdamW, convert_to_grass, grass_optimizer, restore_model
from grass_hf.convert.conversion import grass_slices
from grass_hf.slices import drift

# so that eight ranks divide the rows of every slice
SETTINGS = {"density": 0.5, "update_interval": 3, "selection": "top_r", "side": "output", "state_policy": "carry"}


class Traffic(TorchDispatchMode):
    """(operator, bytes) of every collective."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional", "c10d_functional"):
            tensors = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
            self.seen.append((func._opname, max((t.nbytes for t in tensors), default=0)))
        return func(*args, **(kwargs or {}))


def batch(step: int, ranks: int | None = None) -> torch.Tensor:
    """This rank's two sequences of a step."""
    number = dist.get_rank() if ranks is None else ranks
    draws = torch.Generator().manual_seed(step * 64 + number)
    return torch.randint(VOCABULARY, (2, 10), generator=draws)


def shard(model: nn.Module, layers=(), **options) -> nn.Module:
    """fully_shard as people do it: every layer, then the rest."""
    for layer in layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return model


def llama(dtype=torch.float32, **options) -> nn.Module:
    return tiny_llama(**options).to(dtype)


def train(model, optimizer, steps, accumulate=1, wrapped=None) -> list[float]:
    """Losses, averaged over the ranks."""
    losses = []
    for step in steps:
        total = torch.zeros(())
        for micro in range(accumulate):
            tokens = batch(step * accumulate + micro)
            last = micro == accumulate - 1
            if wrapped is not None:
                wait = contextlib.nullcontext() if last else wrapped.no_sync()
            else:
                model.set_requires_gradient_sync(last)
                wait = contextlib.nullcontext()
            with wait:
                loss = (wrapped or model)(input_ids=tokens, labels=tokens).loss / accumulate
                loss.backward()
            total += loss.detach().float()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
    return losses


def mixtral(dtype=torch.float32, tie_word_embeddings=False) -> nn.Module:
    assert not tie_word_embeddings
    return model_matrix.build("mixtral").to(dtype)


def prepare(sharded: bool, dtype=torch.float32, tied=False, options=None, muon=None, build=llama, **settings):
    model = build(dtype, tie_word_embeddings=tied)
    convert_to_grass(model, GrassConfig(**{**SETTINGS, **settings}))
    wrapped = None
    if sharded:
        shard(model, model.model.layers, **(options or {}))
    else:
        wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW if muon is None else MuonAdamW
    return model, grass_optimizer(model, optimizer, lr=1e-2, weight_decay=0.1, **(muon or {})), wrapped


def full_state(model) -> dict[str, torch.Tensor]:
    full = {}
    for name, value in model.state_dict().items():
        full[name] = value.full_tensor() if isinstance(value, DTensor) else value.clone()
    return full


def assert_equals_ddp(accumulate=1, tied=False, atol=1e-6, steps=8, options=None, **settings):
    results = []
    for sharded in (True, False):
        # float64, because engines add gradients up in other orders and AdamW's first steps are little but their signs
        model, optimizer, wrapped = prepare(
            sharded, torch.float64, tied=tied, options=options if sharded else None, **settings
        )
        losses = train(model, optimizer, range(steps), accumulate, wrapped)
        results.append((losses, [part.index.clone() for part in grass_slices(model)], full_state(model)))
    for ours, theirs in zip(results[0][0], results[1][0], strict=True):
        assert abs(ours - theirs) <= atol, f"losses {results[0][0]} sharded, {results[1][0]} under DDP"
    for ours, theirs in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(ours, theirs)
    for name, value in results[1][2].items():
        torch.testing.assert_close(results[0][2][name], value, rtol=0, atol=max(atol, 2e-5), msg=name)
    assert results[0][0][-1] < results[0][0][0] + 0.1


# -- cases -----------------------------------------------------------------------------------------------------------


def rows_equal_ddp():
    assert_equals_ddp(row_blocks=dist.get_world_size())
    assert_equals_ddp(row_blocks=dist.get_world_size(), state_policy="carry_seeded")


def columns_equal_ddp():
    assert_equals_ddp(side="input")
    assert_equals_ddp(side="input", state_policy="carry_seeded")
    assert_equals_ddp(side="input", selection="cycle", state_policy="carry_seeded")
    defaults = {"selection": "multinomial_norm_nr", "side": "input", "state_policy": "carry_seeded"}
    assert_equals_ddp(**defaults, scale_warmup=3)
    assert_equals_ddp(row_blocks=dist.get_world_size(), selection="cycle", state_policy="carry_seeded")
    assert_equals_ddp(row_blocks=dist.get_world_size(), selection="multinomial_stale_nr")


def muon_equals_ddp():
    assert_equals_ddp(side="input", muon={})
    assert_equals_ddp(side="input", target_modules="all-matrices", muon={})
    assert_equals_ddp(row_blocks=dist.get_world_size(), muon={})


def layers_with_ranks_of_their_own_equal_ddp():
    columns = {"side": "input", "density_pattern": {".*self_attn.*": 0.25, "down_proj": 0.125}}
    rows = {"row_blocks": dist.get_world_size(), "density_pattern": {"(gate|up)_proj": 0.25}}
    for settings, shares in ((columns, {0.125, 0.25, 0.5}), (rows, {0.25, 0.5})):
        model, *_ = prepare(True, **settings)
        assert {part.state.rank / part.state.size for part in grass_slices(model)} == shares
        assert_equals_ddp(muon={} if settings is columns else None, **settings)


def experts_equal_ddp():
    model, *_ = prepare(True, build=mixtral, side="input")
    assert any(part.active.dim() == 3 for part in grass_slices(model))
    assert_equals_ddp(side="input", build=mixtral)
    assert_equals_ddp(side="input", build=mixtral, muon={})


def all_matrices_equal_ddp():
    assert_equals_ddp(side="input", target_modules="all-matrices")
    assert_equals_ddp(side="input", target_modules="all-matrices", tied=True)


def rules_with_replacement_equal_ddp():
    assert_equals_ddp(side="input", selection="multinomial_norm")
    assert_equals_ddp(row_blocks=dist.get_world_size(), selection="multinomial_norm")
    assert_equals_ddp(row_blocks=dist.get_world_size(), selection="uniform", state_policy="reset")


def accumulation_equals_ddp():
    """Norms of the first micro-batch must survive that FSDP moves gradients away after every backward."""
    assert_equals_ddp(accumulate=3, row_blocks=dist.get_world_size())


def without_resharding_equals_ddp():
    assert_equals_ddp(side="input", options={"reshard_after_forward": False})


def cpu_offload_equals_ddp():
    """Sharded parameters, gradients and optimizer state on the CPU; pinned memory would need an accelerator."""
    policy = CPUOffloadPolicy(pin_memory=False)
    assert_equals_ddp(row_blocks=dist.get_world_size(), options={"offload_policy": policy})
    assert_equals_ddp(side="input", options={"offload_policy": policy})


def blocks_are_taken_by_themselves():
    """A model that was converted without a thought of shards: the rows of the next selections lie in the shards."""
    model, optimizer, _ = prepare(True)
    train(model, optimizer, range(4))
    ranks = dist.get_world_size()
    for part in grass_slices(model):
        blocks = part.index.view(ranks, -1)
        length = part.state.size // ranks
        assert all(bool((rows // length == number).all()) for number, rows in enumerate(blocks))
        local = part.weight.to_local()[part.index.view(ranks, -1)[dist.get_rank()] - dist.get_rank() * length]
        assert torch.equal(local, part.active.to_local())


def more_blocks_than_shards():
    assert_equals_ddp(row_blocks=2 * dist.get_world_size())


class Uneven(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(10, 13), nn.Linear(13, 7), nn.Linear(7, 13, bias=False)])

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def uneven_divisions():
    ranks = dist.get_world_size()
    for settings in ({"side": "output", "row_blocks": ranks, "rank": 4}, {"side": "input", "rank": 3}):
        outcomes = []
        for sharded in (True, False):
            model = Uneven()
            convert_to_grass(model, GrassConfig(update_interval=2, **settings))
            if sharded:
                shard(model)
            run = model if sharded else DistributedDataParallel(model)
            optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
            for step in range(6):
                draws = torch.Generator().manual_seed(step * 64 + dist.get_rank())
                run(torch.randn(4, 10, generator=draws)).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            outcomes.append((full_state(model), [part.index.clone() for part in grass_slices(model)]))
        for name, value in outcomes[1][0].items():
            torch.testing.assert_close(outcomes[0][0][name], value, rtol=0, atol=1e-6)
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0][1], outcomes[1][1], strict=True))


def unaligned_rows_stop_with_a_sentence():
    torch.manual_seed(0)  # the same weights on every rank
    model = nn.Sequential(nn.Linear(6, 9))
    convert_to_grass(model, GrassConfig(rank=4, side="output"))  # rows 0 2 4 6; two shards hold rows 0-4 and 5-8
    shard(model)
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-2)
    model(torch.randn(3, 6)).sum().backward()
    before = model[0].weight.full_tensor().clone()
    try:
        optimizer.step()
    except ValueError as error:
        assert "row_blocks=2" in str(error) or dist.get_rank() != 0, error
    else:
        raise AssertionError("went on")
    assert torch.equal(model[0].weight.full_tensor(), before)


def mixed_precision():
    """float32 weights and slices, bfloat16 compute; and pure bfloat16."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, optimizer, _ = prepare(True, options={"mp_policy": policy}, side="input")
    losses = train(model, optimizer, range(8))
    assert losses[-1] < losses[0] and next(grass_slices(model)).active.dtype == torch.float32
    model, optimizer, _ = prepare(True, dtype=torch.bfloat16, slice_dtype="bfloat16", side="input")
    losses = train(model, optimizer, range(8))
    assert losses[-1] < losses[0] + 0.1


def collectives_of_a_step():
    """Write-back and reload move nothing: a selecting step reduces one vector of norms, and no step gathers."""
    for settings in ({}, {"side": "input"}):
        model, optimizer, _ = prepare(True, stagger=1, **settings)
        sizes = sum(part.state.size for part in grass_slices(model))
        for step in range(5):
            tokens = batch(step)
            model(input_ids=tokens, labels=tokens).loss.backward()
            with Traffic() as traffic:
                optimizer.step()
            optimizer.zero_grad()
            gathered = [seen for seen in traffic.seen if "gather" in seen[0] or "scatter" in seen[0]]
            assert not [seen for seen in gathered if seen[1] > 256], traffic.seen
            reduced = [nbytes for name, nbytes in traffic.seen if "reduce" in name and nbytes > 256]
            assert reduced == ([4 * sizes] if step % 3 == 0 else []), (step, traffic.seen)


def bytes_reduced_in_backward():
    """Gradients of slices and ordinary parameters alone are reduced."""

    def reduced(model):
        tokens = batch(0)
        loss = model(input_ids=tokens, labels=tokens).loss
        with Traffic() as traffic:
            loss.backward()
        return sum(nbytes for name, nbytes in traffic.seen if "reduce_scatter" in name)

    model, _, _ = prepare(True, density=0.25, stagger=1)
    expected = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    assert expected <= reduced(model) <= 1.1 * expected  # every parameter is padded to the number of ranks
    plain = llama()
    shard(plain, plain.model.layers)
    assert reduced(plain) > 2 * expected


def _resumed(full: bool):
    options = StateDictOptions(full_state_dict=full, cpu_offload=full, broadcast_from_rank0=full)
    model, optimizer, _ = prepare(True, target_modules="all-matrices")
    train(model, optimizer, range(4))
    state = copy.deepcopy(get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=full)))
    expected = train(model, optimizer, range(4, 9))
    again, its_optimizer, _ = prepare(True, target_modules="all-matrices")
    weights, moments = state
    set_state_dict(again, its_optimizer, model_state_dict=weights, optim_state_dict=moments, options=options)
    assert its_optimizer.grass.step == 4
    assert train(again, its_optimizer, range(4, 9)) == expected
    ours, theirs = full_state(again), full_state(model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def resumes_from_sharded_state():
    _resumed(full=False)


def resumes_from_full_state():
    _resumed(full=True)


def goes_on_on_one_rank_and_comes_back():
    """FSDP2 state, gathered, continues in one ordinary process with the same rows; and the other way round."""
    ranks = dist.get_world_size()
    model, optimizer, _ = prepare(True, row_blocks=ranks)
    train(model, optimizer, range(4))
    options = StateDictOptions(full_state_dict=True)
    # copied as a file would: torch hands the counters of steps on by reference
    weights, moments = copy.deepcopy(get_state_dict(model, optimizer, options=options))
    alone = llama()
    convert_to_grass(alone, GrassConfig(**SETTINGS, row_blocks=ranks))
    its_optimizer = grass_optimizer(alone, torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    set_state_dict(alone, its_optimizer, model_state_dict=weights, optim_state_dict=moments)
    for ours, theirs in zip(grass_slices(alone), grass_slices(model), strict=True):
        assert torch.equal(ours.index, theirs.index)
        assert torch.equal(ours.active, theirs.active.full_tensor())
        moment = optimizer.state[theirs.active]["exp_avg"].full_tensor()
        assert torch.equal(its_optimizer.state[ours.active]["exp_avg"], moment)
    back, back_optimizer, _ = prepare(True, row_blocks=ranks)
    weights, moments = copy.deepcopy(get_state_dict(alone, its_optimizer))
    set_state_dict(
        back,
        back_optimizer,
        model_state_dict=weights,
        optim_state_dict=moments,
        options=StateDictOptions(full_state_dict=True),
    )
    expected = train(model, optimizer, range(4, 8))
    assert train(back, back_optimizer, range(4, 8)) == expected


def rows_that_do_not_fit_the_shards_start_anew():
    """State of rows chosen over the whole side, on one process: said, strided again, training goes on."""
    alone = llama()
    convert_to_grass(alone, GrassConfig(**SETTINGS))
    its_optimizer = grass_optimizer(alone, torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    for step in range(2):
        tokens = batch(step, ranks=0)
        alone(input_ids=tokens, labels=tokens).loss.backward()
        its_optimizer.step()
        its_optimizer.zero_grad()
    weights, moments = get_state_dict(alone, its_optimizer)
    model, optimizer, _ = prepare(True)
    said = []
    from grass_hf.optim import resume

    resume.logger.warning = lambda text, *values: said.append(text % values)
    options = StateDictOptions(full_state_dict=True)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=options)
    assert any("start from evenly strided rows again" in text for text in said), said
    for part in grass_slices(model):
        held = part.weight.full_tensor()[part.index]
        assert torch.equal(held, part.active.full_tensor())
    assert train(model, optimizer, range(2, 5))[-1] < 4.2


def a_sharded_model_is_not_put_back():
    model, _, _ = prepare(True)
    try:
        restore_model(model)
    except ValueError as error:
        assert "is sharded" in str(error)
    else:
        raise AssertionError("put back")


def a_slice_that_is_moved_stops():
    """Values are compared in the first step and after a shard was changed; a changed weight is followed."""
    compared, confirm = [], drift.confirm
    drift.confirm = lambda part: (compared.append(part.state.name), confirm(part))
    model, optimizer, _ = prepare(True)
    train(model, optimizer, range(2))
    compared.clear()
    train(model, optimizer, range(2, 8))
    assert not compared, compared
    part = list(grass_slices(model))[3]
    with torch.no_grad():
        part.weight.to_local().mul_(0.5)
    train(model, optimizer, [8])
    assert compared == [part.state.name]
    with torch.no_grad():
        part.active.to_local().add_(1.0)
    before = full_state(model)
    try:
        train(model, optimizer, [9])
    except RuntimeError as error:
        assert f"the slice of {part.state.name} was changed and its weight was not" in str(error), error
    else:
        raise AssertionError("stepped")
    assert all(torch.equal(value, before[name]) for name, value in full_state(model).items())
    drift.confirm = confirm


def a_plain_optimizer_over_shards_stops():
    model = convert_to_grass(llama(), GrassConfig(**SETTINGS))
    shard(model, model.model.layers)
    before = full_state(model)
    try:
        train(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), range(2))
    except RuntimeError as error:
        assert "and does not drive it" in str(error), error
    else:
        raise AssertionError("stepped")
    assert all(torch.equal(value, before[name]) for name, value in full_state(model).items())


def hybrid_sharding():
    """Two replicas of half as many shards each."""
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicate", "shard"))
    assert_equals_ddp(row_blocks=ranks // 2, options={"mesh": mesh})
    assert_equals_ddp(side="input", options={"mesh": mesh})


def main(ranks: int, names: list[str]) -> None:
    """Run the cases of these names; rank 0 says "ok NAME" of each that has ended well."""
    dist.init_process_group("gloo")
    assert dist.get_world_size() == ranks, f"{dist.get_world_size()} ranks, not {ranks}"
    for name in names:
        globals()[name]()
        dist.barrier()
        if dist.get_rank() == 0:
            print("ok", name, flush=True)
    leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
