"""From an optimizer to one that drives slices: the duty after every step, reselection, state, resume."""
