"""One file for each router, named as its settings in config/routers/: which tokens go to which experts."""

from __future__ import annotations

import importlib

from diffmoe_dist.config import Config, load
from diffmoe_dist.model.routing import Router


def build_router(config: Config) -> Router:
    """The router of one layer: that of the file, or of the import path, which `moe.router` names."""
    name = config.moe.router
    module = importlib.import_module(f"{__name__}.{name}" if name in load.router_names() else name)
    router: Router = module.build_router(config.moe, config)
    return router
