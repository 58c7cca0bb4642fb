"""Every setting of a run: what it is called, its default, and which combinations are impossible. No torch here."""

from diffmoe_dist.config.checks import check, competing_samples, for_world, pool_samples
from diffmoe_dist.config.elastic import Earlier, for_nodes, for_ranks, orders, wishes
from diffmoe_dist.config.load import (
    OBJECTIVE_DEFAULTS,
    build_config,
    is_given,
    let_router_run,
    load_config,
    own_router,
    router_names,
    save_config,
)
from diffmoe_dist.config.router import RouterSettings, expert_slots
from diffmoe_dist.config.schedule import draw_schedule, learning_rate
from diffmoe_dist.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    EMAConfig,
    MixtureConfig,
    ModelConfig,
    ObjectiveConfig,
    ProfileConfig,
    data_sets,
    flat_settings,
    loss_weights,
    model_settings,
)

__all__ = [
    "OBJECTIVE_DEFAULTS",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EMAConfig",
    "Earlier",
    "MixtureConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "ProfileConfig",
    "RouterSettings",
    "build_config",
    "check",
    "competing_samples",
    "data_sets",
    "draw_schedule",
    "expert_slots",
    "flat_settings",
    "for_nodes",
    "for_ranks",
    "for_world",
    "is_given",
    "learning_rate",
    "let_router_run",
    "load_config",
    "loss_weights",
    "model_settings",
    "orders",
    "own_router",
    "pool_samples",
    "router_names",
    "save_config",
    "wishes",
]
