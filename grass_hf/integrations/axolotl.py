"""Grass in axolotl: a plugin, named in the run's YAML file.

    plugins:
      - grass_hf.integrations.axolotl.GrassPlugin
    optimizer: grass
    optim_args:
      density: 0.25

axolotl imports its plugins in every process, before it checks the file: importing this module makes the name "grass"
known to the Trainer, and from there everything is as in any other Trainer. The plugin itself only writes the settings
as the Trainer wants them.
"""

from __future__ import annotations

from axolotl.integrations.base import BasePlugin

import grass_hf

from ..optim_args import optim_args_text
from .registration import NAME


class GrassPlugin(BasePlugin):
    """Makes ``optimizer: grass`` known to axolotl.

    It has no arguments of its own: the settings stand in ``optim_args``, as text or as a mapping.
    """

    def register(self, cfg) -> None:
        """Write a mapping of settings as text, before axolotl does it, which has no way to write lists.

        Args:
            cfg: the YAML file as a mapping, not checked yet.

        Raises:
            ValueError: a setting cannot be written as text.
        """
        grass_hf.register()
        if cfg.get("optimizer") == NAME and isinstance(cfg.get("optim_args"), dict):
            cfg["optim_args"] = optim_args_text(cfg["optim_args"])

    def pre_model_load(self, cfg) -> None:
        """Say "all-linear" as the Trainer and Grass spell it; axolotl's own check allows "all_linear" only."""
        if cfg.get("optimizer") == NAME and cfg.get("optim_target_modules") == "all_linear":
            cfg["optim_target_modules"] = "all-linear"
