"""What a training run changed: shown (`difference`), factored into a LoRA adapter (`lora`), kept as rows (`delta`)."""
