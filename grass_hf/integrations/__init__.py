"""Where grass-hf meets the Trainer and Accelerate; nothing below this folder imports either."""
