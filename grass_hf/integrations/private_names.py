"""The private names of other libraries that this package touches, by the place where each stands.

A new release may move any of them. tests/package/test_private_names.py looks for each in what is installed, and for
names in the package's source that stand in no list here.
"""

from __future__ import annotations

TORCH = {
    "torch": (
        "_C",
        "_disable_dynamo",
        "_foreach_add_",
        "_foreach_lerp",
        "_foreach_lerp_",
        "_foreach_mul_",
        "_foreach_norm",
        "_guards",
        "_has_compatible_shallow_copy_type",
        "_subclasses",
    ),
    "torch._C": ("_current_graph_task_id", "_disabled_torch_function_impl", "_functorch", "_get_tracing_state"),
    "torch._dynamo.eval_frame": ("_orig_mod", "_torchdynamo_orig_callable"),
    "torch._ops.OpOverload": ("_opname", "_schema"),
    "torch._subclasses.fake_tensor": (
        "DataDependentOutputException",
        "DynamicOutputShapeException",
        "FakeCopyMode",
        "FakeTensor",
        "FakeTensorMode",
        "unset_fake_temporarily",
    ),
    "torch.Tensor": ("_base", "_is_view", "_version"),
    "torch.UntypedStorage": ("_cdata",),
    "torch.autograd.Variable": ("_execution_engine",),
    "torch.distributed._functional_collectives": ("_c10d_functional",),
    "torch.distributed.Reducer": ("_rebuild_buckets",),
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper": ("_checkpoint_wrapped_module",),
    "torch.distributed.algorithms.join.Joinable": ("_join_config",),
    "torch.distributed.checkpoint.state_dict": ("_get_fqns", "_get_model_state_dict", "_load_model_state_dict"),
    "torch.distributed.distributed_c10d": ("_get_default_store",),
    "torch.distributed.pipelining.stage": ("_PipelineStageBase",),
    "torch.distributed.tensor.DTensor": ("_local_tensor",),
    "torch.nn.Module": (
        "_apply",
        "_buffers",
        "_call_impl",
        "_compiled_call_impl",
        "_forward_hooks",
        "_forward_hooks_always_called",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
        "_load_from_state_dict",
        "_metadata",
        "_modules",
        "_non_persistent_buffers_set",
        "_parameters",
        "_save_to_state_dict",
    ),
    "torch.nn.parallel.DistributedDataParallel": (
        "_active_ddp_module",
        "_comm_hooks",
        "_ddp_params_and_buffers_to_ignore",
    ),
    "torch.ops.aten": ("_local_scalar_dense",),
    "torch.optim.Optimizer": ("_optimizer_step_post_hooks", "_optimizer_step_pre_hooks"),
    "torch.testing._internal.distributed.fake_pg": ("FakeStore",),
    "torch.utils._python_dispatch": (
        "TorchDispatchMode",
        "_disable_current_modes",
        "_get_current_dispatch_mode_stack",
        "is_traceable_wrapper_subclass_type",
    ),
    "torch.utils._pytree": (
        "tree_leaves",
        "tree_map_only",
    ),
}
TRANSFORMERS = {
    "transformers.PreTrainedModel": ("_from_config", "_keys_to_ignore_on_save", "_no_split_modules"),
    "transformers.Trainer": (
        "_get_output_dir",
        "_issue_warnings_after_load",
        "_load_from_checkpoint",
        "_load_optimizer_and_scheduler",
        "_save_checkpoint",
        "_save_rng_state",
    ),
    "transformers.integrations.moe": ("_apply_gate", "_can_use_grouped_mm", "_is_expert_parallel"),
    "transformers.models.auto.auto_factory": ("_model_mapping",),
}
ACCELERATE = {
    "accelerate.Accelerator": ("_is_accelerate_prepared", "_models"),
    "accelerate.state.AcceleratorState": ("_shared_state",),
}
DEEPSPEED = {
    "deepspeed.DeepSpeedEngine": ("_get_ckpt_name", "_get_zero_ckpt_name", "_zero3_consolidated_16bit_state_dict"),
}
TRL = {
    "trl.experimental.async_distillation.async_distillation_trainer": ("_iter_vllm_named_params",),
    "trl.experimental.async_grpo.async_grpo_trainer": ("_iter_vllm_named_params",),
    "trl.experimental.async_grpo.async_grpo_trainer.AsyncGRPOTrainer": ("_streaming_iter",),
    "trl.experimental.online_dpo.online_dpo_trainer.OnlineDPOTrainer": ("_move_model_to_vllm_inner",),
    "trl.generation.vllm_generation.VLLMGeneration": ("_iter_named_params",),
    "trl.trainer.callbacks": ("_sync_target_model", "_unwrap_model"),
}
PEFT = {"peft.tuners.tuners_utils": ("_ExcludedModule",)}
DATASETS = {"datasets.Dataset": ("_fingerprint",)}
# Of Python itself.
PYTHON = {
    "argparse": ("_StoreFalseAction", "_actions"),
    "concurrent.futures.ProcessPoolExecutor": ("_processes",),
    "enum": ("_member_map_", "_member_names_", "_name_", "_value2member_map_", "_value_"),
    "importlib._bootstrap": ("_initializing",),
    "os": ("_exit",),
    "sys": ("_getframe",),
}

PRIVATE_NAMES: dict[str, tuple[str, ...]] = (
    TORCH | TRANSFORMERS | ACCELERATE | DEEPSPEED | TRL | PEFT | DATASETS | PYTHON
)
