"""What FSDP2 must do, case by case, under torchrun over gloo; test_fsdp.py runs it and reads "ok CASE".

sharded_cases.py RANKS CASE...
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "support"), str(Path(__file__).parents[3])]

import torch
import torch.distributed as dist
from cases import Traffic, run_cases
from sharded_resume_cases import (  # noqa: F401  (found by name)
    goes_on_on_one_rank_and_comes_back,
    resumes_from_full_state,
    resumes_from_sharded_state,
    rows_that_do_not_fit_the_shards_start_anew,
)
from sharded_setup import SETTINGS, assert_equals_ddp, batch, full_state, llama, mixtral, prepare, shard, train
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.tensor import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer, restore_model
from grass_hf.convert.conversion import grass_slices
from grass_hf.slices import drift

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
        assert {slice_.state.rank / slice_.state.size for slice_ in grass_slices(model)} == shares
        assert_equals_ddp(muon={} if settings is columns else None, **settings)


def experts_equal_ddp():
    model, *_ = prepare(True, build=mixtral, side="input")
    assert any(slice_.active.dim() == 3 for slice_ in grass_slices(model))
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
    for slice_ in grass_slices(model):
        blocks = slice_.index.view(ranks, -1)
        length = slice_.state.size // ranks
        assert all(bool((rows // length == number).all()) for number, rows in enumerate(blocks))
        local = slice_.weight.to_local()[slice_.index.view(ranks, -1)[dist.get_rank()] - dist.get_rank() * length]
        assert torch.equal(local, slice_.active.to_local())


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
            outcomes.append((full_state(model), [slice_.index.clone() for slice_ in grass_slices(model)]))
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
        sizes = sum(slice_.state.size for slice_ in grass_slices(model))
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
    drift.confirm = lambda slice_: (compared.append(slice_.state.name), confirm(slice_))
    model, optimizer, _ = prepare(True)
    train(model, optimizer, range(2))
    compared.clear()
    train(model, optimizer, range(2, 8))
    assert not compared, compared
    slice_ = list(grass_slices(model))[3]
    with torch.no_grad():
        slice_.weight.to_local().mul_(0.5)
    train(model, optimizer, [8])
    assert compared == [slice_.state.name]
    with torch.no_grad():
        slice_.active.to_local().add_(1.0)
    before = full_state(model)
    try:
        train(model, optimizer, [9])
    except RuntimeError as error:
        assert f"the slice of {slice_.state.name} was changed and its weight was not" in str(error), error
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


if __name__ == "__main__":
    run_cases(globals())
