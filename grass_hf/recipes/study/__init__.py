"""Studies of quality: one recipe, many methods, each over a grid of learning rates."""
