"""What `grass-hf bench quality` and `speed` compare, each through its own published integration.

| method | comes through | settings, and who recommends them |
|---|---|---|
| adamw | the Trainer's ``adamw_torch_fused`` | everything is trained |
| adamw8bit | the Trainer's ``adamw_bnb_8bit`` (bitsandbytes) | its defaults |
| grass | `GrassCallback` over ``adamw_torch_fused`` | a `GrassConfig`, and ``base``; ``scale`` is the multiplier |
| galore | the Trainer's ``galore_adamw`` (galore-torch) | gap 200, scale 0.25, projection std (its README) |
| apollo | the Trainer's ``apollo_adamw`` (apollo-torch) | gap 200, scale 1, channel-wise, random (its README) |
| lora, dora | PEFT's ``get_peft_model`` | alpha = rank, of each layer (as PEFT's 8 and 8), no dropout |
| frozen | the target matrices frozen, AdamW over the rest | the control that trains no target |

All train embeddings, output head and norms in full (unless a method's own settings target them), so that they
differ in the target matrices alone. [Note: two rates] The targets have the learning rate times the method's
multiplier, and ``weight_decay`` divided by it, so that decay does not depend on it: what `GrassConfig.scale` does
to slices. With ``target_warmup`` that multiplier rises linearly from zero in so many steps, for every method alike: as
`GrassConfig.scale_warmup` has it for slices, and for the others around their optimizers' steps.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ...config.fields import unknown_key
from ...config.optim_args import config_and_base
from ...config.settings import GrassConfig
from ...convert.targets import plan
from ...integrations.base import check_base


@dataclass(frozen=True)
class Kind:
    """A method's optimizer by its Trainer name, its package, and what a study may set.

    Attributes:
        optim: the Trainer's name.
        settings: names and defaults; None where the rank of the study is the default.
        gap: the setting that counts steps between projections or selections, if there is one.
        package: that must be installed, by its module's name.
        install: the same, by its name for pip.
    """

    optim: str = "adamw_torch_fused"
    settings: Mapping[str, Any] = field(default_factory=dict)
    gap: str | None = None
    package: str | None = None
    install: str = ""


_GALORE: dict[str, Any] = {"rank": None, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
_APOLLO: dict[str, Any] = {"rank": None, "update_proj_gap": 200, "scale": 1.0, "proj_type": "std"}
_APOLLO |= {"proj": "random", "scale_type": "channel"}
_LORA: dict[str, Any] = {"rank": None, "lora_alpha": None, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False}
_LORA |= {"rank_pattern": {}}

KINDS = {
    "adamw": Kind(),
    "adamw8bit": Kind("adamw_bnb_8bit", package="bitsandbytes", install="bitsandbytes"),
    "grass": Kind(gap="update_interval"),
    "galore": Kind("galore_adamw", _GALORE, "update_proj_gap", "galore_torch", "galore-torch"),
    "apollo": Kind("apollo_adamw", _APOLLO, "update_proj_gap", "apollo_torch", "apollo-torch"),
    "lora": Kind(settings=_LORA, package="peft", install="peft"),
    "dora": Kind(settings=_LORA | {"use_dora": True}, package="peft", install="peft"),
    "frozen": Kind(),
}
PACKAGES = ("peft", "galore-torch", "apollo-torch", "bitsandbytes")


def resolve(kind: str, settings: Mapping[str, Any], rank: int, targets: Any) -> dict[str, Any]:
    """All settings of a method, what it leaves open filled in.

    Args:
        kind: a name of `KINDS`.
        settings: what the study says.
        rank: of all methods that have one; Grass has a density of its own unless it is given a rank.
        targets: `target_modules` of the study.

    Raises:
        ValueError: a setting is unknown or has no valid value.
    """
    if kind not in KINDS:
        raise ValueError(f"method={unknown_key(kind, KINDS, 'a method that can be compared')}")
    if kind == "grass":
        if "scale" in settings:
            raise ValueError("grass: scale is what the study's multipliers set: leave it out of the settings.")
        config, base = config_and_base({"target_modules": targets, **settings})
        made = config.to_dict()
        if base is not None:
            check_base(str(base), "grass: base")
            made["base"] = base
        return made
    known = KINDS[kind].settings
    for name in settings:
        if name not in known:
            raise ValueError(f"{kind}: " + unknown_key(name, known or ["nothing"], f"a setting of {kind}"))
    made = {**known, **settings}
    if "rank" in made:
        made["rank"] = rank if made["rank"] is None else made["rank"]
    if "lora_alpha" in made:
        made["lora_alpha"] = made["rank"] if made["lora_alpha"] is None else made["lora_alpha"]
    return made


def check_installed(kind: str) -> None:
    """Refuse a method whose package is missing, with a sentence."""
    import importlib.util

    package = KINDS[kind].package
    if package is not None and importlib.util.find_spec(package) is None:
        raise ValueError(
            f"method={kind!r} runs {KINDS[kind].install}, which is not installed: pip install 'grass-hf[peers]', or "
            "leave the method out (--only)."
        )


def target_names(model: nn.Module, targets: Any) -> list[str]:
    """Names of the matrices that methods differ in."""
    return [target.name for target in plan(model, GrassConfig(density=0.25, target_modules=targets)).targets]


def trainer_flags(kind: str, settings: Mapping[str, Any], names: list[str]) -> list[str]:
    """What the Trainer is told of a method, as flags of a recipe."""
    flags = ["--optim", KINDS[kind].optim]
    if kind in ("galore", "apollo"):
        # full names as one regular expression: "all-linear" would take the output head too
        pattern = "|".join(name.replace(".", r"\.") for name in names)
        flags += ["--optim_args", ",".join(f"{name}={value}" for name, value in settings.items())]
        flags += ["--optim_target_modules", f"({pattern})"]
    return flags


def make_ready(
    kind: str, model: nn.Module, settings: Mapping[str, Any], names: list[str], frozen: str | None = None
) -> tuple[nn.Module, set[int]]:
    """A model ready for a method's Trainer, and the ids of the parameters that train its targets.

    Grass is not made ready here: its callback converts, and `recipes.study.two_rates` knows its slices.

    Args:
        kind: a name of `KINDS`.
        model: with its weights.
        settings: of the method.
        names: of the targets.
        frozen: regular expression, found in the names of the parameters that are not trained; None for none.

    Raises:
        ValueError: `frozen` is found in no name.
    """
    if frozen is not None:
        left = [param for name, param in model.named_parameters() if re.search(frozen, name)]
        if not left:
            raise ValueError(f"frozen={frozen!r} is found in no parameter's name of {type(model).__name__}.")
        for param in left:
            param.requires_grad_(False)
    trained = {id(param) for param in model.parameters() if param.requires_grad}
    targets = {id(model.get_submodule(name).weight) for name in names}
    if kind == "frozen":
        for name in names:
            model.get_submodule(name).weight.requires_grad_(False)
    if kind not in ("lora", "dora"):
        return model, targets
    from peft import LoraConfig, get_peft_model

    options = {**settings, "r": settings["rank"], "alpha_pattern": settings.get("rank_pattern", {})}
    del options["rank"]
    model = get_peft_model(model, LoraConfig(target_modules=names, **options))
    adapters = {id(param) for name, param in model.named_parameters() if "lora_" in name}
    for param in model.parameters():
        param.requires_grad_(id(param) in adapters or (id(param) in trained and id(param) not in targets))
    return model, adapters
