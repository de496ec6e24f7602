"""Print the path of the file for ms-swift's ``--external_plugins``."""

from . import PLUGIN

print(PLUGIN)
