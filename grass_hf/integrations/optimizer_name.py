"""The name by which the Trainer knows Grass; what is imported before torch reads it."""

NAME = "grass"
