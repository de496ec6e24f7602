"""Which classes the support matrix tries: every causal LM type, and the classes people finetune beside them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from tiny_configs import tiny_config
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# Kinds, with the mapping of transformers' auto classes that names their classes.
MAPPINGS = {
    "causal LM": "CAUSAL_LM",
    "masked LM": "MASKED_LM",
    "sequence classification": "SEQUENCE_CLASSIFICATION",
    "token classification": "TOKEN_CLASSIFICATION",
    "question answering": "QUESTION_ANSWERING",
    "multiple choice": "MULTIPLE_CHOICE",
    "seq2seq LM": "SEQ_TO_SEQ_CAUSAL_LM",
    "image classification": "IMAGE_CLASSIFICATION",
    "video classification": "VIDEO_CLASSIFICATION",
    "segmentation": "SEMANTIC_SEGMENTATION",
    "detection": "OBJECT_DETECTION",
    "depth": "DEPTH_ESTIMATION",
    "image, text": "IMAGE_TEXT_TO_TEXT",
    "CTC": "CTC",
    "speech seq2seq": "SPEECH_SEQ_2_SEQ",
    "audio classification": "AUDIO_CLASSIFICATION",
}
# More classes of a kind, under other mappings.
MORE = {
    "image, text": ("ZERO_SHOT_IMAGE_CLASSIFICATION", "VISUAL_QUESTION_ANSWERING"),
    "segmentation": ("UNIVERSAL_SEGMENTATION",),
    "detection": ("ZERO_SHOT_OBJECT_DETECTION",),
}
# Kinds whose bodies the language models have tried already: these types of them.
HEADS = {
    "sequence classification": "albert bart bert canine convbert deberta deberta-v2 distilbert electra esm eurobert "
    "falcon funnel gemma2 gpt2 gpt_neox layoutlm layoutlmv3 lilt llama longformer mistral mixtral mobilebert "
    "modernbert mpnet nystromformer phi3 qwen2 qwen3 qwen3_moe roberta squeezebert t5 xlm-roberta xlnet",
    "token classification": "bert deberta-v2 distilbert electra layoutlm layoutlmv3 llama modernbert qwen2 roberta "
    "xlm-roberta t5",
    "question answering": "albert bert deberta-v2 distilbert electra llama longformer modernbert mpnet qwen2 roberta "
    "splinter",
    "multiple choice": "albert bert deberta-v2 electra roberta",
}


@dataclass(frozen=True)
class Case:
    """A class of transformers to try.

    Attributes:
        kind: what it is for, a key of `MAPPINGS`.
        model_type: of its configuration.
        cls: its name.
    """

    kind: str
    model_type: str
    cls: str

    @property
    def name(self) -> str:
        """Unique, for commands and files."""
        return f"{self.model_type}:{self.cls}"


@cache
def overrides() -> dict[str, dict[str, Any]]:
    """By model type or by case: `fields` of the configuration, `inputs`, or a reason to `skip` it."""
    return yaml.safe_load((Path(__file__).parent / "tiny_models.yaml").read_text())


def cases() -> list[Case]:
    """All of them, each once; one class may serve several types."""
    found = {}
    for kind, mapping in MAPPINGS.items():
        wanted = HEADS[kind].split() if kind in HEADS else None
        for name in (mapping, *MORE.get(kind, ())):
            for model_type, classes in getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES", {}).items():
                for cls in [classes] if isinstance(classes, str) else classes:
                    case = Case(kind, model_type, cls)
                    if wanted is None or model_type in wanted:
                        found.setdefault(case.name, case)
    return list(found.values())


def case(name: str) -> Case:
    """The case with a name; an error lists what comes close."""
    known = {c.name: c for c in cases()}
    if name not in known:
        raise KeyError(f"{name} is no case: {[n for n in known if name.split(':')[0] in n][:8]}")
    return known[name]


def settings(case: Case) -> dict[str, Any]:
    """What `tiny_models.yaml` says of a case."""
    of_type, own = (overrides().get(key) or {} for key in (case.model_type, case.name))
    return {key: {**of_type.get(key, {}), **own.get(key, {})} for key in ("fields", "inputs")} | {
        "skip": own.get("skip", of_type.get("skip"))
    }


def build(case: Case) -> nn.Module:
    """A tiny model in float32 with the same weights at every call."""
    torch.manual_seed(0)
    model = _made(case, tiny_config(CONFIG_MAPPING[case.model_type], settings(case)["fields"]))
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped product knows no float64, and wants even sizes
    return model


def build_at_default_size(case: Case) -> nn.Module:
    """The model of its configuration class's own defaults, without memory."""
    given = settings(case)["fields"].get("_given", {})
    with torch.device("meta"):
        return _made(case, CONFIG_MAPPING[case.model_type](**given))


def _made(case: Case, config) -> nn.Module:
    cls = getattr(transformers, case.cls)
    if not isinstance(config, cls.config_class):
        # a class for a part of what the type is: its text, say
        parts = [value for value in vars(config).values() if isinstance(value, cls.config_class)]
        config = parts[0] if parts else cls.config_class.from_dict(config.to_dict())
    for part in (config, *(v for v in vars(config).values() if hasattr(v, "use_cache"))):
        part.use_cache = False
    return cls(config)
