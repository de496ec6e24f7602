"""Measurements of Grass against its limits; every figure in the docs comes from one of these commands."""
