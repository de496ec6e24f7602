"""`grass-hf run` puts this folder on PYTHONPATH for the processes that a script starts; see `sitecustomize`."""
