"""How a `WeightDelta` travels to rollout engines: files, vLLM."""
