"""What a training step costs: simulated without hardware (`estimate`) and measured on it (`bench`)."""
