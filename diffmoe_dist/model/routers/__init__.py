"""One file for each router, named as its settings in config/routers/: which tokens go to which experts."""

from __future__ import annotations

import importlib

from diffmoe_dist.config import Config
from diffmoe_dist.model.routing import Router


def build_router(config: Config) -> Router:
    """The router of one layer: that of the file which `moe.router` names."""
    module = importlib.import_module(f"diffmoe_dist.model.routers.{config.moe.router}")
    router: Router = module.build_router(config.moe, config)
    return router
