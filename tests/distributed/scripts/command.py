"""`grass-hf` with the arguments that are given, for a launcher."""

from grass_hf.cli import main

main()
