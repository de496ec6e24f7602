"""Files that come with the package, found by name: model configs, recipes, and configs for `accelerate launch`.

They stand in `configs/` and `recipes/` at the top of a checkout; an installed package has the two folders within it
(setup.py).
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path

_INSTALLED = Path(__file__).parent / "shipped"
_CHECKOUT = Path(__file__).parents[2]


def model_configs() -> dict[str, Path]:
    """Model configs by name (llama_60m)."""
    return _by_name("configs", "*.json")


def model_config_file(name: str, what: str) -> Path | None:
    """The file or folder of a model's config that a user names; None for what only the hub can know.

    Args:
        name: a folder, a config JSON, a shipped config's name, or a hub id.
        what: named in errors.

    Raises:
        ValueError: the name is a path, and no config can be read there.
    """
    path, shipped = Path(name), model_configs()
    if not path.exists() and path.name.removesuffix(".json") in shipped and len(path.parts) == 1:
        path = shipped[path.name.removesuffix(".json")]
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"{what}={name!r} is a folder without config.json: give a folder that save_pretrained wrote.")
    if path.is_file():
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{what}={name!r} is not a readable JSON file ({error}): give a model's config.") from None
        if not isinstance(values, dict) or "model_type" not in values:
            raise ValueError(
                f"{what}={name!r} has no model_type, so it is no config of transformers: give a config.json."
            )
    elif path.suffix == ".json":
        raise ValueError(f"{what}={name!r} is not a file: {known_configs()}.")
    return path if path.exists() else None


def known_configs() -> str:
    """The shipped model configs, as the end of a sentence."""
    return f"shipped configs are {', '.join(model_configs())}"


def recipes() -> dict[str, Path]:
    """Recipes by name (llama_demo_sotu)."""
    return _by_name("recipes", "*/*.yaml")


def launch_configs() -> dict[str, Path]:
    """Configs for `accelerate launch --config_file`, by name (ddp_8gpu)."""
    return _by_name("configs", "accelerate/*.yaml")


def shipped_file(name: str) -> Path | None:
    """The file that a checkout has as `name` (configs/accelerate/zero3.json), or None."""
    top, _, rest = name.partition("/")
    path = _folder(top) / rest if top in ("configs", "recipes") else None
    return path if path is not None and path.is_file() else None


def find_recipe(given: str | Path) -> Path:
    """The recipe that a user names: a file, or else a shipped recipe by its name.

    Raises:
        ValueError: it is neither; the sentence names the shipped recipe that is nearest.
    """
    path, known = Path(given), recipes()
    if path.exists():
        return path
    name = path.name.removesuffix(".yaml")
    if len(path.parts) == 1 and name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"did you mean the shipped recipe {near[0]}" if near else "`grass-hf recipes list` names the shipped ones"
    raise ValueError(
        f"{path} cannot be read (No such file or directory): give the path of a YAML recipe, or the name of a shipped "
        f"one; {hint}{'?' if near else '.'}"
    )


def _by_name(folder: str, pattern: str) -> dict[str, Path]:
    return {path.stem: path for path in sorted(_folder(folder).glob(pattern))}


def _folder(name: str) -> Path:
    installed = _INSTALLED / name
    return installed if installed.is_dir() else _CHECKOUT / name
