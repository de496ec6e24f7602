"""What ZeRO must do, case by case, under torchrun over gloo; test_zero.py runs it and reads "ok CASE".

zero_cases.py RANKS CASE...
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "support"), str(Path(__file__).parents[3])]

import torch
import torch.distributed as dist
from helpers import VOCABULARY, leave, tiny_llama
from sharded_cases import Traffic
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import grass_hf  # noqa: F401  (before DeepSpeed, which it teaches)

import deepspeed  # isort: skip

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer
from grass_hf.convert.conversion import grass_slices
from grass_hf.integrations.zero import ZeroController
from grass_hf.measure.estimate.simulate import enable_checkpointing
from grass_hf.optim.driving import plain_class

# DeepSpeed would compile a collective of its own for processes on one machine; gloo will do.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

SETTINGS = {"density": 0.25, "update_interval": 3, "selection": "top_r", "side": "output", "state_policy": "carry"}
STEPS = 7  # selections after steps 0, 3 and 6


def batch(step: int) -> torch.Tensor:
    """This rank's two sequences of a step."""
    draws = torch.Generator().manual_seed(step * 64 + dist.get_rank())
    return torch.randint(VOCABULARY, (2, 10), generator=draws)


def ds_config(stage: int, accumulate=1, clip=0.0, bfloat16=False, fp16=None, gradients=None, **zero) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": clip,
        "zero_allow_untested_optimizer": True,
        # tiny weights would all stay gathered
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **zero},
        **({"bf16": {"enabled": True}} if bfloat16 else {}),
        **({"fp16": {"enabled": True, **fp16}} if fp16 else {}),
        "data_types": {"grad_accum_dtype": gradients},
    }


def converted(build=tiny_llama, base=torch.optim.AdamW, arguments=None, **settings):
    model = build()
    convert_to_grass(model, GrassConfig(**{**SETTINGS, **settings}))
    # a large eps, because AdamW with a small one makes 1 of the smallest gradients, and -1 of what other sums round to
    smooth = {"eps": 1e-2} if base is torch.optim.AdamW else {}
    return model, grass_optimizer(model, base, **{"lr": 1.0, "weight_decay": 0.1, **smooth, **(arguments or {})})


def zero(stage: int, options=None, **given):
    """An engine whose optimizer Grass follows; the rest as `converted`."""
    model, optimizer = converted(**given)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(stage, **(options or {})))
    assert engine.zero_optimization_stage() == stage and isinstance(engine.optimizer.grass, ZeroController)
    partitioned = [hasattr(part.weight, "ds_tensor") for part in grass_slices(model)]
    assert all(partitioned) == any(partitioned) == (stage == 3)
    return engine


def schedule(optimizer, step: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 3e-2 * (1 - step / 20)


def train(engine, steps, accumulate: int = 1) -> list[float]:
    """Losses, averaged over the ranks."""
    losses = []
    for step in steps:
        schedule(engine.optimizer, step)
        total = torch.zeros(())
        for micro in range(accumulate):
            tokens = batch(step * accumulate + micro)
            loss = engine(input_ids=tokens, labels=tokens).loss
            engine.backward(loss)
            engine.step()
            total += loss.detach().float() / accumulate
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
    return losses


def train_ddp(model, optimizer, steps, accumulate: int = 1, clip: float = 0.0) -> list[float]:
    wrapped, losses = DistributedDataParallel(model), []
    for step in steps:
        schedule(optimizer, step)
        total = torch.zeros(())
        for micro in range(accumulate):
            tokens = batch(step * accumulate + micro)
            with contextlib.nullcontext() if micro == accumulate - 1 else wrapped.no_sync():
                loss = wrapped(input_ids=tokens, labels=tokens).loss / accumulate
                loss.backward()
            total += loss.detach().float()
        if clip:
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
    return losses


def indices(model) -> list[torch.Tensor]:
    return [part.index.clone() for part in grass_slices(model)]


def weights(model) -> dict[str, torch.Tensor]:
    """All parameters, whole."""
    found = {}
    for name, param in model.named_parameters():
        with deepspeed.zero.GatheredParameters([param]) if hasattr(param, "ds_tensor") else contextlib.nullcontext():
            found[name] = param.detach().clone()
    return found


def assert_equals_ddp(accumulate=1, clip=0.0, stages=(1, 2, 3), zero_options=None, **given):
    """The same losses, rows and weights in float32; DeepSpeed takes sums in another order."""
    model, optimizer = converted(**given)
    start = indices(model)
    losses = train_ddp(model, optimizer, range(STEPS), accumulate, clip)
    rows, expected = indices(model), weights(model)
    assert any(not torch.equal(a, b) for a, b in zip(start, rows, strict=True))
    for stage in stages:
        options = {"accumulate": accumulate, "clip": clip, **(zero_options or {})}
        engine = zero(stage, options, **given)
        ours = train(engine, range(STEPS), accumulate)
        worst = max(abs(a - b) for a, b in zip(ours, losses, strict=True))
        assert worst <= 5e-6, (stage, ours, losses)
        for mine, theirs in zip(indices(engine.module), rows, strict=True):
            assert torch.equal(mine, theirs), stage
        found = weights(engine.module)
        gap = max(float((found[name] - value).abs().max()) for name, value in expected.items())
        assert gap <= 5e-6, (stage, gap)
        if dist.get_rank() == 0:
            print(f"# stage {stage}: losses within {worst:.1e}, weights within {gap:.1e}", flush=True)
        for part in grass_slices(engine.module):
            assert_slice_is_in_weight(part)


def assert_slice_is_in_weight(part):
    tensors = [p for p in (part.weight, part.active) if hasattr(p, "ds_tensor")]
    with deepspeed.zero.GatheredParameters(tensors) if tensors else contextlib.nullcontext():
        index, write = part.index, part.write
        if index.dim() == 1:
            rows = part.weight.index_select(part.dim, index)
            active = part.active if write is None else part.active * write.unsqueeze(-1 if part.dim == -2 else -2)
            keep = torch.ones_like(index, dtype=torch.bool) if write is None else part.rho != 0
            rows, active = rows.movedim(part.dim, 0)[keep], active.movedim(part.dim, 0)[keep]
            torch.testing.assert_close(rows, active, rtol=0, atol=0)


# -- cases -----------------------------------------------------------------------------------------------------------


def rows_equal_ddp():
    assert_equals_ddp()


def columns_equal_ddp():
    assert_equals_ddp(side="input")
    assert_equals_ddp(selection="multinomial_norm_nr", side="input", state_policy="carry_seeded")  # the defaults
    assert_equals_ddp(selection="multinomial_stale_nr", side="input", state_policy="carry_seeded")


def rules_with_replacement_equal_ddp():
    assert_equals_ddp(selection="multinomial_norm")
    assert_equals_ddp(selection="multinomial_norm", side="input", stages=(3,))


def a_rule_without_scores_equals_ddp():
    assert_equals_ddp(selection="uniform_nr")
    assert_equals_ddp(selection="uniform", state_policy="reset", base=torch.optim.SGD, arguments={"momentum": 0.9})


def accumulation_and_clipping_equal_ddp():
    assert_equals_ddp(accumulate=3, clip=0.5)


def tied_embeddings_equal_ddp():
    def build():
        return tiny_llama(tie_word_embeddings=True)

    assert_equals_ddp(build=build, target_modules="all-matrices", side="input")


def experts_equal_ddp():
    def build():
        torch.manual_seed(0)
        shape = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
        sizes = {"num_key_value_heads": 2, "vocab_size": VOCABULARY, "num_local_experts": 3, "use_cache": False}
        return MixtralForCausalLM(MixtralConfig(**shape, **sizes))

    assert_equals_ddp(build=build, stages=(2, 3))
    assert_equals_ddp(build=build, side="input", stages=(3,))


def gradient_checkpointing_equals_ddp():
    for reentrant in (False, True):

        def build(reentrant=reentrant):
            model = tiny_llama()
            enable_checkpointing(model, use_reentrant=reentrant)
            return model

        assert_equals_ddp(build=build, stages=(2, 3))


def weights_that_stay_gathered_equal_ddp():
    """DeepSpeed's default for small ones, here for some and for all."""
    for threshold in (600, 100_000):
        assert_equals_ddp(stages=(3,), zero_options={"stage3_param_persistence_threshold": threshold})


def a_model_made_in_pieces_equals_ddp():
    """deepspeed.zero.Init leaves weights empty from the beginning: shapes and first rows come from their parts."""
    config = tiny_llama().config
    whole = tiny_llama().state_dict()

    def build():
        with deepspeed.zero.Init(config_dict_or_path=ds_config(3)):
            model = LlamaForCausalLM(config)
        assert all(param.numel() == 0 for param in model.parameters())
        for name, param in model.named_parameters():
            with deepspeed.zero.GatheredParameters([param], modifier_rank=0):
                if dist.get_rank() == 0:
                    param.data.copy_(whole[name])
        return model

    model, optimizer = converted(target_modules="all-matrices")
    losses = train_ddp(model, optimizer, range(4))
    ours = train(zero(3, build=build, target_modules="all-matrices"), range(4))
    assert max(abs(a - b) for a, b in zip(ours, losses, strict=True)) <= 2e-5, (ours, losses)


def bfloat16():
    """DeepSpeed keeps float32 masters of the slices: digits below the weights' last place add up and are rounded in."""

    def build():
        return tiny_llama().bfloat16()

    model, optimizer = converted(build=build, stagger=1)
    losses = train_ddp(model, optimizer, range(STEPS))
    for stage in (1, 2, 3):
        for kind in ("bf16", "fp32") if stage == 1 else ("bf16",):  # the second is another class of DeepSpeed's
            engine = zero(stage, {"bfloat16": True, "gradients": kind}, build=build, stagger=1)
            assert (plain_class(engine.optimizer).__name__ == "BF16_Optimizer") == (kind == "fp32")
            model = engine.module
            ours = train(engine, range(STEPS))
            assert max(abs(a - b) for a, b in zip(ours, losses, strict=True)) <= 2e-2, (stage, ours, losses)
            for part in grass_slices(model):
                assert part.active.dtype == part.weight.dtype == torch.bfloat16
                exact = part.rank_part(part, True).active
                assert exact.dtype == torch.float32 and (exact != exact.bfloat16()).any()
                assert_slice_is_in_weight(part)


def overflow_changes_nothing():
    """DeepSpeed skips a step whose gradients overflowed: so do selection, decay and the count of steps."""

    def build():
        return tiny_llama().bfloat16()

    def begin(stage):
        model, optimizer = converted(build=build)
        config = ds_config(stage)
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        return model, deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]

    for stage in (1, 2):
        model, engine = begin(stage)
        train(engine, range(3))
        controller, before, rows = engine.optimizer.grass, weights(model), indices(model)
        tokens = batch(3)
        engine.backward(engine(input_ids=tokens, labels=tokens).loss * float("inf"))
        engine.step()
        assert engine.optimizer.overflow and controller.step == 3
        assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
        assert all(torch.equal(a, b) for a, b in zip(indices(model), rows, strict=True))
        train(engine, range(3, 5))
        assert controller.step == 5 and not all(torch.equal(a, b) for a, b in zip(indices(model), rows, strict=True))
        smooth, its_engine = begin(stage)
        train(its_engine, range(5))
        assert all(torch.equal(value, weights(smooth)[name]) for name, value in weights(model).items())
        for ours, theirs in zip(grass_slices(model), grass_slices(smooth), strict=True):
            assert torch.equal(ours.index, theirs.index) and ours.state.energy == theirs.state.energy


def float16_with_dynamic_loss_scaling():
    """A step that overflows is skipped without a trace, the next has half the scale; the end is the float32 run's."""
    deepspeed.get_accelerator().is_fp16_supported = lambda: True  # slow on this processor, not wrong
    expected = train_ddp(*converted(), range(STEPS))

    def build():
        return tiny_llama().half()

    # too large at first, and doubled again so soon that it overflows in mid-run too
    scaling = {"initial_scale_power": 24, "loss_scale_window": 2, "hysteresis": 1}
    for stage in (1, 2, 3):
        engine = zero(stage, {"fp16": scaling}, build=build)
        controller, losses, skipped = engine.optimizer.grass, [], []
        while len(losses) < STEPS:
            before, rows = weights(engine.module), indices(engine.module)
            loss = train(engine, [controller.step])
            if engine.skipped_steps == len(skipped):
                losses += loss
                continue
            skipped.append(controller.step)
            assert len(skipped) < 30 and controller.step == len(losses)
            assert all(torch.equal(value, before[name]) for name, value in weights(engine.module).items())
            assert all(torch.equal(a, b) for a, b in zip(indices(engine.module), rows, strict=True))
        assert skipped.count(0) > 1 and max(skipped) > 0, skipped
        assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) <= 2e-2, (stage, losses, expected)
        for part in grass_slices(engine.module):
            assert part.active.dtype == torch.float16
            assert_slice_is_in_weight(part)


def gradients_that_are_not_finite_stop_the_run():
    for stage in (1, 2, 3):
        engine = zero(stage)
        train(engine, range(2))
        before, tokens = weights(engine.module), batch(3)
        scale = float("nan") if dist.get_rank() == 1 else 1.0
        engine.backward(engine(input_ids=tokens, labels=tokens).loss * scale)
        try:
            engine.step()
        except FloatingPointError as error:
            assert "self_attn.q_proj is not finite at optimizer step 2" in str(error)
        else:
            raise AssertionError(f"stage {stage} went on")
        assert all(torch.equal(value, before[name]) for name, value in weights(engine.module).items())


def staggered_selections_and_warm_up_equal_ddp():
    assert_equals_ddp(stagger=100, update_interval=20, state_policy="carry_seeded", stages=(2, 3))
    momentum = {"base": torch.optim.SGD, "arguments": {"momentum": 0.9}}
    assert_equals_ddp(state_policy="reset_warmup", scale_warmup=3, stages=(2, 3), **momentum)


def state_in_blocks_is_refused():
    from bitsandbytes.optim import AdamW8bit

    for stage in (2, 3):
        engine = zero(stage, base=AdamW8bit, arguments={"min_8bit_size": 64})
        try:
            train(engine, range(1))
        except ValueError as error:
            assert "AdamW8bit keeps 'state1'" in str(error) and "use an optimizer with state per element" in str(error)
        else:
            raise AssertionError("carried")


def no_weight_is_gathered_after_a_step():
    """ZeRO-3 writes back and selects with collectives of the slices' size, in bytes: r n, never m n."""

    def build():
        return tiny_llama(hidden_size=64, intermediate_size=256)

    for side in ("output", "input"):
        engine = zero(3, build=build, side=side, density=0.125)
        controller, counted = engine.optimizer.grass, []
        after = controller._after_step

        def watched(after=after, counted=counted):
            with Traffic() as traffic:
                after()
            counted.append(max((nbytes for _, nbytes in traffic.seen), default=0))

        controller._after_step = watched
        train(engine, range(4))
        slices = [part.active.ds_numel for part in grass_slices(engine.module)]
        weight = min(part.weight.ds_numel for part in grass_slices(engine.module) if part.weight.ds_numel > 64 * 64)
        assert 0 < max(counted[1:3]) <= 4 * sum(slices)  # all slices in one go
        assert max(counted[0], counted[3]) <= 4 * max(sum(slices), 4 * max(slices)), (counted, slices)
        assert 4 * max(slices) < 4 * weight


def resumes_exactly():
    for stage in (1, 2, 3):
        folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(folder)
        settings = {"selection": "multinomial_norm", "target_modules": "all-matrices"}
        more = [{"bfloat16": True, "gradients": "fp32"}] if stage == 1 else []
        for options in ({}, {"bfloat16": True}, *more):

            def build(dtype=torch.bfloat16 if options else torch.float32):
                return tiny_llama().to(dtype)

            engine = zero(stage, options, build=build, **settings)
            train(engine, range(5))
            # weights that slices train are frozen: adapters are saved without frozen ones
            engine.save_checkpoint(folder[0], client_state={"mine": 7}, exclude_frozen_parameters=not options)
            expected = train(engine, range(5, 9))
            again = zero(stage, options, build=build, **settings)
            _, client_state = again.load_checkpoint(folder[0])
            assert client_state["mine"] == 7 and again.optimizer.grass.step == 5
            assert train(again, range(5, 9)) == expected
            ours, theirs = weights(again.module), weights(engine.module)
            assert all(torch.equal(ours[name], value) for name, value in theirs.items())
            for a, b in zip(grass_slices(again.module), grass_slices(engine.module), strict=True):
                assert torch.equal(a.index, b.index) and a.state.owed == b.state.owed
                assert torch.equal(a.state.trained, b.state.trained)
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(folder[0])


def incomplete_checkpoints_are_refused():
    """By name, on every rank, before anything is read."""
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    engine = zero(2)
    train(engine, range(2))
    engine.save_checkpoint(folder[0])
    before = weights(engine.module)
    files = [*sorted(Path(folder[0]).rglob("*.pt")), Path(folder[0]) / "latest"]
    assert len(files) == dist.get_world_size() + 2
    for file in files:
        for keep in (None, 0.5):
            dist.barrier()
            content = file.read_bytes()
            dist.barrier()
            if dist.get_rank() == 0:
                file.unlink()
                if keep and file.suffix:
                    file.write_bytes(content[: int(keep * len(content))])
            dist.barrier()
            try:
                engine.load_checkpoint(folder[0])
            except ValueError as error:
                assert file.name in str(error), error
                assert ("truncated" if keep and file.suffix else "missing") in str(error), error
            else:
                raise AssertionError(file)
            dist.barrier()
            if dist.get_rank() == 0:
                file.write_bytes(content)
    type(engine).save_checkpoint(engine, folder[0], tag="without")
    try:
        engine.load_checkpoint(folder[0], tag="without")
    except ValueError as error:
        assert "was not written by a Grass run" in str(error)
    else:
        raise AssertionError("loaded what Grass did not write")
    assert all(torch.equal(value, before[name]) for name, value in weights(engine.module).items())
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder[0])


def another_base_is_refused():
    """And other settings of it, before DeepSpeed has loaded anything."""
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    for stage in (1, 2, 3):
        engine = zero(stage)
        train(engine, range(2))
        engine.save_checkpoint(folder[0], tag=f"stage{stage}")
        for words, given in (
            ("is that of torch.optim.adamw.AdamW, and this run has torch.optim.sgd.SGD", {"base": torch.optim.SGD}),
            ("resuming with betas=(0.9, 0.95)", {"arguments": {"betas": (0.9, 0.95)}}),
        ):
            other = zero(stage, **given)
            before = weights(other.module)
            masters = [flat.values.clone() for flat in other.optimizer.grass._place.values()]
            try:
                other.load_checkpoint(folder[0], tag=f"stage{stage}")
            except ValueError as error:
                assert words in str(error), error
            else:
                raise AssertionError(given)
            assert all(torch.equal(value, before[name]) for name, value in weights(other.module).items())
            after = [flat.values for flat in other.optimizer.grass._place.values()]
            assert all(map(torch.equal, masters, after)) and other.optimizer.grass.step == 0
        dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder[0])


def main(ranks: int, names: list[str]) -> None:
    """Run the cases of these names; rank 0 says "ok NAME" of each that has ended well."""
    deepspeed.init_distributed("gloo")
    assert dist.get_world_size() == ranks, f"{dist.get_world_size()} ranks, not {ranks}"
    for name in names:
        globals()[name]()
        dist.barrier()
        if dist.get_rank() == 0:
            print("ok", name, flush=True)
    leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
