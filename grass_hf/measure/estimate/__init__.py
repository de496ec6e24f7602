"""Memory, traffic and time of a step, counted or computed without allocating a model."""
