"""The file for ms-swift's ``--external_plugins``: it adds ``--optimizer grass``.

ms-swift checks ``--optim`` before it imports plugins, so the name cannot come that way. Its ``--optimizer`` is looked
up afterwards, in a registry; ``--optim`` then names the base optimizer. It is imported as a file that belongs to no
package, so its imports are absolute.
"""

from __future__ import annotations

from swift.optimizers import OptimizerCallback, optimizers_map

import grass_hf
from grass_hf.integrations.base import with_base
from grass_hf.integrations.optimizer_name import NAME


class GrassOptimizerCallback(OptimizerCallback):
    """Lets ms-swift's trainers train as with ``optim="grass"``, over the optimizer that ``--optim`` names.

    ms-swift makes it before it calls the Trainer's own ``__init__``, in which the model is converted. The optimizer and
    its scheduler are the Trainer's.

    Raises:
        ValueError: ``--optim`` and ``--optim_args`` name two base optimizers, or a setting is wrong.
    """

    def __init__(self, args, trainer):
        super().__init__(args, trainer)
        if args.optim == NAME:
            return
        args.optim_args = with_base(args.optim_args, str(getattr(args.optim, "value", args.optim)))
        args.optim = type(args.optim)(NAME)


grass_hf.register()
optimizers_map[NAME] = GrassOptimizerCallback
