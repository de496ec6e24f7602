"""Grass in ms-swift: a file for its ``--external_plugins``, which ``python -m grass_hf.integrations.ms_swift`` names.

    swift sft --external_plugins "$(python -m grass_hf.integrations.ms_swift)" \\
        --optimizer grass --optim_args "density=0.25" --tuner_type full ...

The file has a folder of its own, because ms-swift puts the folder of a plugin first on Python's path.
"""

from __future__ import annotations

from pathlib import Path

PLUGIN = Path(__file__).with_name("grass_plugin.py")
