"""The tensor work under a slice: taps, norms, products, selection, rounding, 8-bit weights, shards. No state."""
