"""The audit of a first training forward: weights that a model reads behind the back of their slices."""
