"""From a file and `key=value` overrides to a checked configuration.

Unknown keys, wrong types and impossible combinations end here, before torch is even imported. A setting that the
chosen path would ignore is refused.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diffmoe_dist.config.checks import check, check_run
from diffmoe_dist.config.parse import Given, apply_overrides, check_scalars, merge, read_yaml
from diffmoe_dist.config.router import MoEConfig, RouterSettings
from diffmoe_dist.config.schema import MODEL_SIZES, Config
from diffmoe_dist.errors import UserError
from diffmoe_dist.logs import logger
from diffmoe_dist.own_code import import_module, is_import_path

OBJECTIVE_DEFAULTS: dict[str, dict[str, Any]] = {
    "flow": {"time_distribution": "uniform", "direction": "data_at_one", "time_scale": 1.0},
    "ddpm": {"time_distribution": "uniform", "direction": "noise_at_one", "time_scale": 1.0},  # its only values
}
RENAMED = {"score": "fid"}  # sections that had another name in version 0.1
_OF_A_SIZE = ("depth", "hidden_size", "num_heads")


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, training: bool = True, stored: bool = False
) -> Config:
    """Read a YAML file, apply `key=value` overrides, and return the checked, resolved configuration.

    Args:
        training: whether it is for a run, which needs `run_dir` and `data.shards`.
        stored: as in `build_config`.

    Raises:
        UserError: the file or a key is unknown, a value has the wrong type, or settings contradict each other.
    """
    return build_config(read_yaml(find_config(path)), overrides=overrides, training=training, stored=stored)


def find_config(path: str | Path) -> Path:
    """A file; or one that comes with the package, as `configs/digits.yaml` from any folder.

    Raises:
        UserError: there is none.
    """
    path, shipped = Path(path), Path(__file__).parents[1] / "configs"
    if path.is_file():
        return path
    if not path.is_absolute():
        found = shipped / (path.relative_to("configs") if path.parts[:1] == ("configs",) else path)
        if found.is_file():
            return found
    if path.is_dir():
        raise UserError(f"--config {path}: is a folder; give a file in it")
    raise UserError(f"--config {path}: no such file, nor one of {shipped}; see there for examples")


def is_given(name: str, overrides: Sequence[str], path: str | Path | None = None) -> bool:
    """Whether overrides, or a file, say what the setting `name` is.

    Raises:
        UserError: they cannot be read.
    """
    found: Any = apply_overrides({} if path is None else read_yaml(find_config(path)), overrides, Config())
    for part in name.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found is not None


def build_config(
    *layers: Mapping[str, Any], overrides: Sequence[str] = (), training: bool = True, stored: bool = False
) -> Config:
    """Merge layers of settings over the defaults, later ones winning; derive what follows from them; check the result.

    A null is a setting that is not given: it unsets what an earlier layer gave.

    Args:
        overrides: `key=value`, which win over all layers.
        training: as in `load_config`.
        stored: the layers come with a model: they cannot choose code to run, and overrides no other router.

    Raises:
        UserError: as `load_config`.
    """
    _tell_of_repeated(overrides)
    given: Given = functools.reduce(merge, layers, {})
    if stored:
        _check_stored_router(given, overrides)
    schema = Config(moe=_moe_schema(apply_overrides(given, _of_moe(overrides), Config())))
    given = _with_new_names(apply_overrides(given, overrides, schema))
    _refuse_unknown_keys(given, schema, prefix="")
    try:
        typed = OmegaConf.merge(OmegaConf.structured(schema), check_scalars(_without_nulls(given), schema))
        config = OmegaConf.to_object(OmegaConf.merge(typed, _derived(typed, schema)))
    except OmegaConfBaseException as error:
        where = error.full_key or "config"
        raise UserError(f"{where}: {str(error).splitlines()[0]}; give a value of the right type") from None
    assert isinstance(config, Config)
    check(config)
    if training:
        check_run(config)
    return config


def save_config(config: Config, path: Path) -> None:
    """Write the resolved settings as YAML that `load_config` reads back to an equal Config."""
    OmegaConf.save(OmegaConf.structured(config), path)


def router_names() -> list[str]:
    """The routers there are: dense, and the files of config/routers/."""
    files = (Path(__file__).parent / "routers").glob("[!_]*.py")
    return ["dense", *sorted(path.stem for path in files)]


def own_router(config: Config) -> str | None:
    """The module of the user's own that the router is in; None: it is one of this package's."""
    return None if config.moe.router in router_names() else config.moe.router


def _tell_of_repeated(overrides: Sequence[str]) -> None:
    values: dict[str, str] = {}
    for key, _, value in (override.partition("=") for override in overrides):
        if values.setdefault(key, value) != value:
            both = (repr(given)[1:-1] for given in (values[key], value))  # on one line, whatever is in them
            logger.warning("%s is given twice, as %s and as %s; the last one counts", repr(key)[1:-1], *both)
        values[key] = value


def _of_moe(overrides: Sequence[str]) -> list[str]:
    """Those that may choose the router, on which depends what the others may say."""
    return [override for override in overrides if override.partition("=")[0] in ("moe", "moe.router")]


def let_router_run(overrides: Sequence[str]) -> list[str]:
    """Import the router of the user's own that overrides name, for the settings of a model; the other overrides."""
    own = [f"moe.router={name}" for name in _router_of({}, overrides) if name not in router_names()]
    for override in own:
        _own_settings(override.partition("=")[2])
    return [override for override in overrides if override not in own]


def _router_of(given: Any, overrides: Sequence[str] = ()) -> list[str]:
    """The one that they name, if they do."""
    found = apply_overrides(given, _of_moe(overrides), Config())
    moe = found.get("moe") if isinstance(found, dict) else None
    router = moe.get("router") if isinstance(moe, dict) else None
    return [router] if isinstance(router, str) else []


def _check_stored_router(given: Any, overrides: Sequence[str]) -> None:
    """Refuse one whose code nobody has asked for, and another one than the model's."""
    asked = _router_of({}, overrides)
    for router in _router_of(given):
        if asked and asked != [router]:
            raise UserError(f"moe.router={asked[0]}, but the model is one with moe.router={router}; leave it out")
        if not asked and router not in (*router_names(), *sys.modules) and is_import_path(router):
            raise UserError(
                f"moe.router={router} is code outside of this package; give moe.router={router} to say that it may "
                "run, or import it first in Python"
            )


def _moe_schema(given: Any) -> MoEConfig:
    """The settings that the chosen router knows, with their defaults."""
    moe = given.get("moe") if isinstance(given, dict) else None
    router = moe.get("router", MoEConfig.router) if isinstance(moe, dict) else MoEConfig.router
    names = router_names()
    if router not in names and isinstance(router, str) and is_import_path(router):
        return _own_settings(router)
    if router not in names:
        close = difflib.get_close_matches(str(router), names, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(
            f"moe.router={router} is not a router; {hint}choose from {', '.join(names)}, or the "
            "import path of your own, as my_package.my_router"
        )
    if router == "dense":
        return MoEConfig()
    settings: RouterSettings = importlib.import_module(f"diffmoe_dist.config.routers.{router}").Settings(router=router)
    return settings


def _own_settings(router: str) -> RouterSettings:
    """Those of the module with this import path, which has the router as well."""
    module = import_module(
        router, f"moe.router={router}", "install what it is part of, or start where it lies: the model is one with it"
    )
    kind = getattr(module, "Settings", None)
    if not (isinstance(kind, type) and issubclass(kind, RouterSettings) and is_dataclass(kind)):
        raise UserError(
            f"moe.router={router}: {module.__file__} has no dataclass Settings that extends "
            "diffmoe_dist.config.RouterSettings; write one"
        )
    if not callable(getattr(module, "build_router", None)):
        raise UserError(
            f"moe.router={router}: {module.__file__} has no function build_router(settings, config); write one"
        )
    return kind(router=router)


def _with_new_names(given: Any) -> Any:
    """Sections under the names they have now; one under its old name is told where it does something."""
    for old, new in RENAMED.items():
        if isinstance(given, dict) and old in given:
            given = {**given}
            section = given.pop(old)
            if isinstance(section, dict) and section.get("every"):
                logger.warning("the settings %s.* are called %s.* now; the old name goes with version 0.3", old, new)
            given[new] = merge(section, given.get(new, section))
    return given


def _without_nulls(given: Any) -> Any:
    if isinstance(given, dict):
        return {key: _without_nulls(value) for key, value in given.items() if value is not None}
    return [_without_nulls(value) for value in given] if isinstance(given, list) else given


def _derived(typed: Any, schema: Config) -> dict[str, dict[str, Any]]:
    """By section, the settings that are not given and follow from others. Raises UserError."""
    derived = {"model": _derived_model(typed.model), "objective": _derived_objective(typed.objective)}
    if OmegaConf.is_missing(typed.sample, "time_shift"):
        derived["sample"] = {"time_shift": typed.objective.time_shift}
    if schema.experts is not None:
        derived["moe"] = schema.experts.derived(typed)
    return derived


def _derived_model(model: Any) -> dict[str, Any]:
    """Depth, width and heads of the preset that `model.size` names."""
    preset = {} if model.size is None else dict(zip(_OF_A_SIZE, MODEL_SIZES[model.size], strict=True))
    for name in _OF_A_SIZE:
        given = None if OmegaConf.is_missing(model, name) else model[name]
        if given is None and not preset:
            raise UserError(f"model.{name} is not set; give it a value or choose model.size from {list(MODEL_SIZES)}")
        if given is not None and preset and given != preset[name]:
            raise UserError(
                f"model.{name}={given} contradicts model.size={model.size} ({name} {preset[name]}); drop one"
            )
    return {**preset, **_derived_head_dim(model, *((preset or model)[name] for name in _OF_A_SIZE[1:]))}


def _derived_head_dim(model: Any, hidden_size: int, num_heads: int) -> dict[str, int]:
    if not OmegaConf.is_missing(model, "head_dim"):
        return {}
    if min(hidden_size, num_heads) < 1:
        return {"head_dim": 1}  # `check` tells what is wrong with the other two
    if hidden_size % num_heads:
        raise UserError(
            f"model.hidden_size={hidden_size} is not divisible by model.num_heads={num_heads}; choose a multiple, or "
            "give model.head_dim"
        )
    return {"head_dim": hidden_size // num_heads}


def _derived_objective(objective: Any) -> dict[str, Any]:
    defaults = OBJECTIVE_DEFAULTS[objective.name]
    for name, value in defaults.items():
        if objective.name == "ddpm" and not OmegaConf.is_missing(objective, name) and objective[name] != value:
            raise UserError(f"objective.{name}={objective[name]} has no effect with objective.name=ddpm; remove it")
    return {name: value for name, value in defaults.items() if OmegaConf.is_missing(objective, name)}


def _refuse_unknown_keys(given: Any, schema: Any, prefix: str) -> None:
    """OmegaConf also refuses them; this names the nearest known key."""
    known = {f.name: getattr(schema, f.name) for f in fields(schema)}
    if given is None:  # a section with nothing in it
        return
    if not isinstance(given, dict):
        raise UserError(
            f"{prefix.rstrip('.') or 'config'}={given}: expected settings below it, such as {prefix}{next(iter(known))}"
        )
    for key, value in list(given.items()):
        if key in known and is_dataclass(known[key]):
            _refuse_unknown_keys(value, known[key], f"{prefix}{key}.")
        elif key not in known and isinstance(schema, MoEConfig):
            _refuse_unknown_router_setting(given, key, schema)
        elif key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            remedy = f"did you mean {prefix}{close[0]}?" if close else f"known here: {', '.join(known)}"
            raise UserError(f"unknown setting {prefix}{key}={value}; {remedy}")


def _refuse_unknown_router_setting(moe: dict[Any, Any], key: str, schema: MoEConfig) -> None:
    if moe[key] is None:
        del moe[key]
        return
    known = [f.name for f in fields(schema) if f.name != "router"]
    close = difflib.get_close_matches(str(key), known, n=1)
    if close:
        raise UserError(f"unknown setting moe.{key}={moe[key]}; did you mean moe.{close[0]}?")
    raise UserError(
        f"moe.{key}={moe[key]} has no effect with moe.router={schema.router}, which knows "
        f"{', '.join(known) or 'nothing else'}; remove it"
    )
