"""``python -m grass_hf`` is the command ``grass-hf``; so is ``accelerate launch -m grass_hf``."""

from .cli import main

main()
