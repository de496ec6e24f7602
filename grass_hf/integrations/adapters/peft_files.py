"""adapter_config.json and adapter_model.safetensors: what PEFT calls each tensor, and the fields that announce it.

PEFT adds ``B A`` to a linear layer's (m, n), and its transpose to what is stored (n, m), a Conv1D or an embedding. The
experts of one parameter have their A one below the other, (E r, n), and their B interleaved, (m, r E); the parameters
of one module are wrapped one in the other, the first innermost. alpha = r throughout, so that products count once.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from .factor import Factors

_PREFIX = "base_model.model."


class AdapterFiles:
    """The two files of a LoRA adapter while it is put together.

    Args:
        rank: of a factored matrix that does not say otherwise.
    """

    def __init__(self, rank: int):
        self.rank = rank
        self.tensors: dict[str, Tensor] = {}
        self.ranks: dict[str, int] = {}  # by module
        self.experts: dict[str, tuple[str, list[Factors]]] = {}  # by parameter
        self.biases: dict[str, Tensor] = {}  # by module
        self.whole: set[str] = set()
        self.transposed = False

    @property
    def empty(self) -> bool:
        return not self.ranks and not self.experts

    def add_product(self, module: str, kind: str, factors: Factors) -> None:
        """A module of `kind` "linear", "Conv1D" or "embedding" whose stored weight changes by left @ right."""
        self.ranks[module] = factors.rank
        self.transposed |= kind == "Conv1D"
        a, b = _a_and_b(kind, factors)
        names = ("embedding_A", "embedding_B") if kind == "embedding" else ("A.weight", "B.weight")
        self._put(f"{module}.lora_{names[0]}", a)
        self._put(f"{module}.lora_{names[1]}", b)

    def add_experts(self, parameter: str, kind: str, factors: list[Factors]) -> None:
        """A parameter (E, m, n), stored as "linear" or as "Conv1D" stores its matrix; one product per expert."""
        self.experts[parameter] = kind, factors

    def add_bias(self, module: str, bias: Tensor) -> None:
        self.biases[module] = bias

    def add_whole(self, module: str, parameters: dict[str, Tensor]) -> None:
        """A module that is stored as it is, with all of its parameters."""
        self.whole.add(module)
        for leaf, value in parameters.items():
            self._put(f"{module}.{leaf}", value)

    def write(self, folder: Path, base: Path, model: PreTrainedModel) -> int:
        """Write both files, check that PEFT finds every tensor's place, and return the bytes of the weights."""
        self._place_experts(model)
        biases = {module: bias for module, bias in self.biases.items() if module not in self.whole}
        for module, bias in biases.items():
            self._put(f"{module}.base_layer.bias" if module in self.ranks else f"{module}.bias", bias)
        self._config(base, model, bool(biases)).save_pretrained(folder)
        file = folder / "adapter_model.safetensors"
        save_file(self.tensors, file, metadata={"format": "pt"})
        _check_loads(model, folder)
        return file.stat().st_size

    def _place_experts(self, model: PreTrainedModel) -> None:
        for parameter, (kind, factors) in self.experts.items():
            module, _, leaf = parameter.rpartition(".")
            rank = self.ranks[parameter] = max(found.rank for found in factors)
            order = [name for name, _ in model.get_submodule(module).named_parameters(recurse=False)]
            later = sum(f"{module}.{name}" in self.experts for name in order[order.index(leaf) + 1 :])
            pairs = [_a_and_b(kind, found) for found in factors]
            a = torch.stack([_padded(a, rank, 0) for a, _ in pairs])  # (E, r, n)
            b = torch.stack([_padded(b, rank, 1) for _, b in pairs])  # (E, m, r)
            key = module + ".base_layer" * later
            self._put(f"{key}.lora_A.weight", a.flatten(0, 1))
            self._put(f"{key}.lora_B.weight", b.permute(1, 2, 0).flatten(1, 2))

    def _config(self, base: Path, model: PreTrainedModel, biases: bool):
        from peft import LoraConfig

        odd = {name: rank for name, rank in self.ranks.items() if rank != self.rank}
        experts: dict[str, Any] = {"target_parameters": sorted(self.experts)} if self.experts else {}
        return LoraConfig(
            base_model_name_or_path=str(base),
            task_type=_task(model),
            r=self.rank,
            lora_alpha=self.rank,
            rank_pattern=odd,
            alpha_pattern=dict(odd),
            lora_dropout=0.0,
            target_modules=sorted(set(self.ranks) - set(self.experts)),
            **experts,
            modules_to_save=sorted(self.whole) or None,
            bias="all" if biases else "none",
            fan_in_fan_out=self.transposed,
            inference_mode=True,
        )

    def _put(self, key: str, value: Tensor) -> None:
        # of its own and contiguous: safetensors refuses tensors that share memory
        self.tensors[_PREFIX + key] = value.clone(memory_format=torch.contiguous_format)


def _a_and_b(kind: str, factors: Factors) -> tuple[Tensor, Tensor]:
    return (factors.right, factors.left) if kind == "linear" else (factors.left.T, factors.right.T)


def _padded(factor: Tensor, rank: int, dim: int) -> Tensor:
    """With zeros up to the rank of the expert that needs most."""
    shape = list(factor.shape)
    shape[dim] = rank - shape[dim]
    return torch.cat([factor, factor.new_zeros(shape)], dim)


def _task(model: PreTrainedModel) -> str | None:
    """PEFT's name of the task; None for those where PEFT would choose modules to save by itself."""
    if model.config.is_encoder_decoder:
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM" if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")) else None


def _check_loads(model: PreTrainedModel, folder: Path) -> None:
    """Load the adapter into the model without values, as PEFT would: all tensors find their place, none is missing."""
    from peft import PeftConfig, PeftModel
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are for people who train
        shell = PeftModel(model, PeftConfig.from_pretrained(str(folder)), low_cpu_mem_usage=True)
        weights = load_peft_weights(str(folder), device="cpu")
        try:
            loaded: Any = set_peft_model_state_dict(shell, weights, low_cpu_mem_usage=True)
            missing = [key for key in loaded.missing_keys if ".lora_" in key or ".modules_to_save.default." in key]
            unexpected = list(loaded.unexpected_keys)
        except KeyError as error:
            missing, unexpected = list(error.args), []
    if missing or unexpected:
        raise ValueError(
            f"PEFT would not load the adapter of a {model.config.model_type} model (missing {missing[:3]}, unexpected "
            f"{unexpected[:3]}): use `grass-hf delta save`, which takes any model."
        )
