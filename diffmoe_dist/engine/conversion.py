"""From the files of published code bases, and from our own checkpoints, to a folder of weights."""

from __future__ import annotations

import argparse
import hashlib
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffmoe_dist.config import Config, build_config
from diffmoe_dist.config.pool_choice import PoolChoiceSettings
from diffmoe_dist.data.class_names import NO_NAMES, ClassNames, names_of_texts
from diffmoe_dist.engine.checkpoint import find_checkpoint, read_checkpoint_model
from diffmoe_dist.engine.ema import stored_average
from diffmoe_dist.engine.post_hoc import Fit, read_average
from diffmoe_dist.engine.progress import read_progress
from diffmoe_dist.engine.sharded_state import EMA, MASTER
from diffmoe_dist.engine.weights import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    check_out,
    find_model,
    is_weights_folder,
    read_class_names,
    read_model,
    read_record,
    read_settings,
    write_weights,
)
from diffmoe_dist.errors import UserError
from diffmoe_dist.files import atomic_file, file_sha256, read_json_object, refuse_pointer
from diffmoe_dist.logs import logger
from diffmoe_dist.model.diffusers_names import from_diffusers, settings_of
from diffmoe_dist.model.dit import DiT, initialize
from diffmoe_dist.model.on_meta import meta_model
from diffmoe_dist.model.published import (
    Part,
    as_published,
    check_buildable,
    check_tensors,
    correspondence,
    fill,
    threshold_decay,
)
from diffmoe_dist.model.recognise import Recognised, recognise

# Where the code bases keep the two sets of weights in a training checkpoint.
_KEYS = {"ema": ("ema", "ema_model_state_dict"), "model": ("model", "model_state_dict")}
OUR_TRANSFORMER = "DiffMoETransformer2DModel"  # in a pipeline of diffusers
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_COUNT = "n_averaged"  # that torch's AveragedModel keeps beside the weights


def convert_published(
    layout: str, file: Path, config: Config, out: Path, weights: str | None = None, upcycle: bool = False
) -> str:
    """Write the weights of a published file as a folder of ours.

    A decay of thresholds in the file becomes `moe.threshold_decay` of the folder's settings.

    Args:
        layout: a key of `published.LAYOUTS`.
        config: the model that the file holds, or with `upcycle` the one that its dense model is to become.
        weights: "ema" or "model", of a file that holds several; default: the averaged ones where it has them.

    Returns:
        Which weights were taken: "ema", "model" or "only".

    Raises:
        UserError: the file or `out` is not as it should be; nothing is written then.
    """
    check_out(out)
    config = _with_text_encoder(config, file)
    published, taken = read_state_dict(file, weights)
    _refuse_other_layout(layout, published, file)
    source = {"layout": layout, "file": file.name, "sha256": file_sha256(file), "weights": taken, "upcycled": upcycle}
    _write_converted(layout, published, config, out, source, file)
    return taken


def convert_diffusers(folder: Path, config: Config | None, out: Path) -> None:
    """Write the model of a pipeline of diffusers, a DiT or one of ours, as a folder of ours.

    Args:
        folder: of a pipeline, or of its transformer.
        config: of the mixture of experts that a dense model is to become; None: it stays what it is.

    Raises:
        UserError: the folder is not as it should be; nothing is written then.
    """
    check_out(out)
    index = _read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    transformer = folder / "transformer" if index else folder
    described = _read_json(transformer / "config.json")
    tensors = _diffusers_tensors(transformer)
    source = {"layout": "diffusers", "file": folder.name, "upcycled": config is not None}
    if described.get("_class_name") == OUR_TRANSFORMER:
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        if config is not None:
            raise UserError(f"--upcycle starts from a dense model of diffusers' DiT; {folder} is a model of ours")
        _write_ours(tensors, described, out, source, folder)
        return
    texts = index.get("id2label") or {}
    num_classes = len(texts) or None
    settings = settings_of(described, num_classes, str(transformer))
    published = from_diffusers(tensors, described, num_classes, str(transformer))
    names = names_of_texts([str(texts.get(str(label), "")) for label in range(len(texts))])
    _write_converted("dit", published, config or build_config(settings, training=False), out, source, folder, names)


def _write_ours(
    tensors: dict[str, Tensor], described: dict[str, Any], out: Path, source: dict[str, Any], folder: Path
) -> None:
    if not isinstance(described.get("settings"), dict):
        raise UserError(f"{folder}: config.json of its transformer has no settings; export it again")
    config = build_config(described["settings"], training=False, stored=True)
    needed = meta_model(config).state_dict()
    shapes, found = ({name: value.shape for name, value in of.items()} for of in (needed, tensors))
    wrong = next((name for name in {**shapes, **found} if shapes.get(name) != found.get(name)), None)
    if wrong is not None:
        raise UserError(f"{folder}: {wrong} is not as its settings need it; export it again")
    _refuse_non_finite(tensors, f"{folder}")
    try:
        names = ClassNames.from_json({name: value for name, value in described.items() if value is not None})
    except ValueError as error:
        raise UserError(f"{folder}: {error}; export it again") from None
    write_weights(out, {name: tensors[name].to(like.dtype) for name, like in needed.items()}, config, source, names)


def _diffusers_tensors(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
    if files:
        return {name: tensor for file in files for name, tensor in read_state_dict(file)[0].items()}
    return read_state_dict(folder / "diffusion_pytorch_model.bin")[0]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}); give the folder of a pipeline of diffusers") from None


def _write_converted(
    layout: str,
    published: Mapping[str, Tensor],
    config: Config,
    out: Path,
    source: dict[str, Any],
    file: Path,
    names: ClassNames = NO_NAMES,
) -> None:
    upcycle = source["upcycled"]
    parts = _parts(layout, config, published, upcycle)
    check_tensors(parts, published, str(file))
    _refuse_non_finite(published, f"{file}")
    decay = threshold_decay(parts, published, str(file))
    if decay is not None:
        assert isinstance(config.moe, PoolChoiceSettings)  # else there is no such tensor
        config = replace(config, moe=replace(config.moe, threshold_decay=decay))
    with torch.device("meta"):
        model = DiT(config)
    model.to_empty(device="cpu")
    if upcycle:
        initialize(model, config.seed)  # the routers; everything else is overwritten
    fill(model.state_dict(), parts, published)
    write_weights(out, model.state_dict(), config, source, names)


def inspect_published(file: Path, weights: str | None = None) -> str:
    """The configuration of the model that a published file holds, as YAML that `--config` takes.

    Behind what no tensor tells stands what it is taken from.

    Raises:
        UserError: the file is not one of DiT, DiffMoE or ProMoE, or holds tensors beside those of such a model.
    """
    published, taken = read_state_dict(file, weights)
    recognised = recognise({name: tensor.shape for name, tensor in published.items()}, str(file))
    settings = {section: dict(values) for section, values in recognised.settings.items()}
    if "num_heads" not in settings["model"]:
        inner = published["blocks.0.attn.qkv.weight"].shape[0] // 3
        settings["model"] |= {"num_heads": 1, "head_dim": inner}  # any that gives the shapes
    parts = _parts(recognised.layout, build_config(settings, training=False), published)
    check_tensors(parts, published, str(file))
    return "\n".join(
        [
            f"# {file.name}{'' if taken == 'only' else f' ({taken})'}: convert it with --from "
            f"{recognised.layout}. What no tensor tells is marked.",
            *_lines(recognised),
            "",
        ]
    )


def _lines(recognised: Recognised) -> Iterator[str]:
    for section, values in recognised.settings.items():
        yield f"{section}:"
        marks = {key.partition(".")[2]: why for key, why in recognised.guesses.items() if key.startswith(f"{section}.")}
        for name, value in values.items():
            shown = str(value).lower() if isinstance(value, bool) else value
            yield f"  {name}: {shown}" + (f"  # not in the tensors: {marks[name]}" if name in marks else "")
        yield from (f"  # {name}: {why}" for name, why in marks.items() if name not in values)


def _parts(
    layout: str, config: Config, published: Mapping[str, Tensor], upcycle: bool = False
) -> dict[str, list[Part]]:
    shapes = {name: value.shape for name, value in meta_model(config).state_dict().items()}
    return correspondence(layout, config, shapes, upcycle, found=published)


def _refuse_other_layout(layout: str, published: Mapping[str, Tensor], file: Path) -> None:
    """A file that has experts of another code base is told as such, rather than by a tensor that is missing."""
    try:
        found = recognise({name: tensor.shape for name, tensor in published.items()}, str(file))
    except UserError:
        return  # `check_tensors` says what is wrong with it
    experts = found.settings.get("moe")
    if experts is not None and found.layout != layout:
        raise UserError(
            f"--from {layout}: {file} has the names of --from {found.layout}, with moe.router={experts['router']}; "
            f"use --from {found.layout}, and --inspect to see its settings"
        )


def _with_text_encoder(config: Config, file: Path) -> Config:
    """A text model's configuration with the fingerprint of its encoder, by the folder of weights the file lies in."""
    sha256 = config.model.text_encoder_sha256
    if config.model.condition != "text":
        return config
    if not sha256 and file.name == WEIGHTS_NAME and file.with_name(CONFIG_NAME).is_file():
        sha256 = read_settings(file.parent).model.text_encoder_sha256
    if not sha256:
        raise UserError(
            "model.text_encoder_sha256 is not set, and a text model is one with its encoder; give the encoder_sha256 "
            "in index.json of its captions' folder"
        )
    return replace(config, model=replace(config.model, text_encoder_sha256=sha256))


def export_checkpoint(
    directory: str | Path,
    out: Path,
    weights: str | None = None,
    ema_decay: float | None = None,
    ema_length: float | None = None,
) -> tuple[Path, Fit | None]:
    """Write the weights of one of our checkpoints as a folder.

    Args:
        directory: a run folder (its newest checkpoint) or a step folder.
        weights: "ema" (default) or "model", the fp32 weights that the optimizer works on.
        ema_decay: which of the averages, by its decay; default: that of `ema.decay`.
        ema_length: or the average of this length, made of those that the run's checkpoints hold.

    Returns:
        The checkpoint that was read, and for `ema_length` what its average was made of.

    Raises:
        UserError: there is no checkpoint, it is damaged, or `out` is not empty.
    """
    check_out(out)
    checkpoint = find_checkpoint(directory)
    taken = weights or "ema"
    made: Fit | None = None
    if ema_length is not None:
        model, config, made = read_average(checkpoint, ema_length)
    else:
        ema = read_settings(checkpoint).ema
        kind = MASTER if taken == "model" else stored_average(ema, ema_decay)
        model, config = read_checkpoint_model(checkpoint, "cpu", kind)
        taken = taken if ema_decay is None else f"{taken} {ema_decay:g}"
    _refuse_non_finite(model.state_dict(), f"checkpoint {checkpoint}")
    progress = read_progress(checkpoint)
    source: dict[str, Any] = {
        "checkpoint": checkpoint.name,
        "step": progress.step,
        "images_seen": progress.images_seen,
        "sha256": _folder_sha256(checkpoint),
        "weights": taken,
    }
    if made is not None:
        averages = [
            {"checkpoint": name, "length": length, "coefficient": number}
            for (name, length), number in made.sources.items()
        ]
        source |= {"ema_length": ema_length, "error": made.error, "averages": averages}
    write_weights(out, model.state_dict(), config, source, read_class_names(checkpoint))
    return checkpoint, made


def export_published(layout: str, directory: str | Path, out: Path, weights: str | None = None) -> Path:
    """Write the weights of a checkpoint or of a folder of weights as a file of a published code base.

    Args:
        layout: a key of `published.LAYOUTS`.
        directory: a run folder (its newest checkpoint), a step folder, or a folder of weights.
        out: the file.
        weights: "ema" (default) or "model", of a checkpoint.

    Returns:
        The folder that was read.

    Raises:
        UserError: there are no weights, the code base has no such model, or `out` is there already.
    """
    if out.exists():
        raise UserError(f"--out {out}: exists; choose another or remove it")
    source, model, config, _ = read_weights(directory, weights)
    check_buildable(layout, config)
    if layout == "promoe" and config.model.num_classes != 1000 and config.experts is not None:
        logger.warning(
            "ProMoE's code takes label 1000 for the null label; of this model it is %d; edit it there",
            config.model.num_classes,
        )
    tensors = as_published(model.state_dict(), _parts(layout, config, {}), getattr(config.moe, "threshold_decay", None))
    # ProMoE's sampler asks for this key; DiT's and DiffMoE's take a state dict as it is.
    key = "model_state_dict" if weights == "model" else "ema_model_state_dict"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(out) as file:
            torch.save({key: tensors} if layout == "promoe" else tensors, file)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); choose another") from None
    return source


def read_weights(directory: str | Path, weights: str | None) -> tuple[Path, DiT, Config, dict[str, Any]]:
    """The folder that was read, the model of a checkpoint or of a folder of weights, its settings, and what is known of
    its training: `step`, `images_seen`, `weights`.

    Args:
        weights: "ema" (default) or "model", of a checkpoint.

    Raises:
        UserError: there are no weights, or they are not all finite.
    """
    source = find_model(directory)
    if is_weights_folder(source):
        if weights is not None:
            raise UserError(f"--weights {weights}: {source} holds one set of weights; leave it out")
        model, config = read_model(source, "cpu")
        record = read_record(source)["source"]
        facts = {name: record[name] for name in ("step", "images_seen", "weights") if name in record}
    else:
        model, config = read_checkpoint_model(source, "cpu", {"ema": EMA, "model": MASTER}[weights or "ema"])
        progress = read_progress(source)
        facts = {"step": progress.step, "images_seen": progress.images_seen, "weights": weights or "ema"}
    _refuse_non_finite(model.state_dict(), f"{source}")
    return source, model, config, facts


def read_state_dict(path: Path, weights: str | None = None) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file by name, and which weights they are: "ema", "model", or "only" where it holds one set.

    The file is one of torch.save, of a state dict or of a training checkpoint, or one of safetensors. Nothing in it is
    executed.

    Raises:
        UserError: it is none of these, or does not hold the weights asked for.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give one of torch.save or of safetensors")
    refuse_pointer(path)
    content = _load_safetensors(path) if path.suffix == ".safetensors" else _load_pickle(path)
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path} holds a {type(content).__name__}, no state dict; save the model's state_dict()")
    held = {kind: content[key] for kind, keys in _KEYS.items() for key in keys if isinstance(content.get(key), dict)}
    if not held:
        if weights is not None:
            raise UserError(f"--weights {weights}: {path} holds one set of weights; leave it out")
        return _only_tensors(path, content), "only"
    taken = weights or ("ema" if "ema" in held else "model")
    if taken not in held:
        raise UserError(f"--weights {taken}: {path} holds no such weights, only --weights {next(iter(held))}")
    return _only_tensors(path, held[taken]), taken


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is no file of safetensors, or damaged ({error}); fetch it again") from None


def _load_pickle(path: Path) -> Any:
    try:
        # DiffMoE's trainer keeps its command line in its checkpoints: an object of plain attributes.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle can fail in any way
        refused = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if refused:
            raise UserError(
                f"{path} names {refused[1]}, which could be code, so it is not loaded; where the file came from, save "
                "the state dict alone: torch.save(checkpoint['ema'], FILE)"
            ) from None
        reason = " ".join(str(error).split(".")[0].split())
        raise UserError(
            f"{path} is no file of torch.save, or damaged ({type(error).__name__}: {reason}); fetch it again"
        ) from None


def _only_tensors(path: Path, content: Any) -> dict[str, Tensor]:
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(
                f"{path}: {name} is a {type(value).__name__}, no tensor, and there is no ema or model beside it; save "
                "the model's state_dict()"
            )
    named = {_without_wrappers(name): value for name, value in content.items()}
    if len(named) < len(content):
        raise UserError(
            f"{path} holds tensors under one name but for module., _orig_mod. or the like; save one set of them"
        )
    named.pop(_COUNT, None)
    return named


def _without_wrappers(name: str) -> str:
    """A tensor's name without what DistributedDataParallel, FSDP and torch.compile put into it."""
    plain = _WRAPPERS.sub("", name).removeprefix("module.")
    return plain if plain == name else _without_wrappers(plain)


def _refuse_non_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            count = int((~tensor.isfinite()).sum())
            raise UserError(
                f"{where}: {name} holds numbers that are not finite, {count} of {tensor.numel()}; its run has diverged "
                "or the file is damaged: take an older one"
            )


def _folder_sha256(folder: Path) -> str:
    """Of the names and the content of all files: `sha256sum` of the output of `sha256sum` on them in order."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{file_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
