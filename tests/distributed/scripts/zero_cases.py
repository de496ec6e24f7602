"""What ZeRO must do, case by case, under torchrun over gloo; test_zero.py runs it and reads "ok CASE".

zero_cases.py RANKS CASE...
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "support"), str(Path(__file__).parents[3])]

import torch
import torch.distributed as dist
from cases import Traffic, run_cases
from helpers import VOCABULARY, tiny_llama
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import grass_hf  # noqa: F401  (before DeepSpeed, which it teaches)

import deepspeed  # isort: skip

from zero_resume_cases import another_base_is_refused, incomplete_checkpoints_are_refused, resumes_exactly  # noqa: F401  (found by name)
from zero_setup import (
    STEPS,
    assert_equals_ddp,
    assert_slice_is_in_weight,
    batch,
    converted,
    ds_config,
    indices,
    train,
    train_ddp,
    weights,
    zero,
)

from grass_hf.convert.conversion import grass_slices
from grass_hf.measure.estimate.simulate import enable_checkpointing
from grass_hf.optim.driving import plain_class

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
            for slice_ in grass_slices(model):
                assert slice_.active.dtype == slice_.weight.dtype == torch.bfloat16
                exact = slice_.rank_part(slice_, True).active
                assert exact.dtype == torch.float32 and (exact != exact.bfloat16()).any()
                assert_slice_is_in_weight(slice_)


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
        for slice_ in grass_slices(engine.module):
            assert slice_.active.dtype == torch.float16
            assert_slice_is_in_weight(slice_)


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
        slices = [slice_.active.ds_numel for slice_ in grass_slices(engine.module)]
        weight = min(
            slice_.weight.ds_numel for slice_ in grass_slices(engine.module) if slice_.weight.ds_numel > 64 * 64
        )
        assert 0 < max(counted[1:3]) <= 4 * sum(slices)  # all slices in one go
        assert max(counted[0], counted[3]) <= 4 * max(sum(slices), 4 * max(slices)), (counted, slices)
        assert 4 * max(slices) < 4 * weight


if __name__ == "__main__":
    run_cases(globals(), deepspeed.init_distributed)
