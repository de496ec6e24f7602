"""What a run is told: the settings of Grass, presets, and the texts that settings come as. Standard library only."""
