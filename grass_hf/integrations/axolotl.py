"""Grass in axolotl: a plugin, named in the run's YAML file.

    plugins:
      - grass_hf.integrations.axolotl.GrassPlugin
    optimizer: grass
    optim_args:
      density: 0.25

axolotl imports its plugins in every process, before it checks the file: importing this package makes the name "grass"
known to the Trainer, to which axolotl hands every name that is not its own. From there all is as in any Trainer.
"""

from __future__ import annotations

from axolotl.integrations.base import BasePlugin

import grass_hf

from .optimizer_name import NAME


class GrassPlugin(BasePlugin):
    """Makes ``optimizer: grass`` known to axolotl.

    It has no arguments of its own: the settings stand in ``optim_args``, as text or as a mapping.
    """

    def register(self, cfg) -> None:
        """Called with the YAML file as a mapping, before axolotl checks it."""
        grass_hf.register()

    def pre_model_load(self, cfg) -> None:
        """Say "all-linear" as the Trainer and Grass spell it; axolotl's own check allows "all_linear" only."""
        if cfg.get("optimizer") == NAME and cfg.get("optim_target_modules") == "all_linear":
            cfg["optim_target_modules"] = "all-linear"
