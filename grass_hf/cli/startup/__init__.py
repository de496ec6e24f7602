"""The folder that `grass-hf run` puts on PYTHONPATH for the processes that a script starts: `sitecustomize` is in it."""
