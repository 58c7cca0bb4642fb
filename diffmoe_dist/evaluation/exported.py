"""Reading a torch.export program (.pt2) without running code of its author.

`torch.export.load` is no safe reader: it falls back to pickle, evaluates symbolic sizes as Python, writes names of the
graph into generated source, imports the modules that tree specifications name, and loads compiled libraries. So the
archive is first proven to be operators of ATen on tensors and nothing else: every record, name, operator and
expression in it is of a known harmless form. What torch reads is then a copy made of exactly the checked content.
"""

from __future__ import annotations

import io
import json
import logging
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export.passes import move_to_device_pass
from torch.export.pt2_archive import PT2ArchiveReader, PT2ArchiveWriter

from diffmoe_dist.files import refuse_irregular

_MODEL = "models/model.json"
_INPUTS = "data/sample_inputs/model.pt"
_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_TENSOR = re.compile(r"data/(weights/weight|constants/tensor)_\d+")
_OF_THE_ARCHIVE = ("archive_format", "archive_version", "byteorder", ".data/version", ".data/serialization_id")
_PLAIN_NAME = re.compile(r"(?!.*__[a-z]+__)[A-Za-z0-9_.+]*")
_NO_TENSORS = ("as_graph", "as_custom_obj", "as_operator", "class_fqn")
_EXPRESSION_TOKEN = re.compile(
    r"Symbol\('[a-z]+\d+'(, (integer|positive|nonnegative|nonzero)=True)*\)"
    r"|(Add|Mul|Pow|Integer|Rational|Max|Min|FloorDiv|CeilDiv|Mod|PythonMod|CleanDiv|CeilToInt|IntTrueDiv)\("
    r"|\d+|[-+*/(), ]"
)
_ARITHMETIC = {
    "add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "neg", "eq", "ne", "lt", "le", "gt", "ge", "getitem",
}  # fmt: skip
_LEAF: dict[str, Any] = {"type": None, "context": None, "children_spec": []}
_ONE_TENSOR_IN = [
    1,
    {
        "type": "builtins.tuple",
        "context": "null",
        "children_spec": [
            {"type": "builtins.tuple", "context": "null", "children_spec": [_LEAF]},
            {"type": "builtins.dict", "context": "[]", "children_spec": []},
        ],
    },
]
_ONE_TENSOR_OUT = [1, _LEAF]


class UnsafeProgramError(ValueError):
    """The archive holds something other than operators on tensors; the message says what."""


def load_program(path: Path, device: torch.device) -> torch.nn.Module:
    """The function of a .pt2 file, one tensor in and one out, on a device.

    Raises:
        UnsafeProgramError: the archive holds more than ATen operators on tensors.
        Exception: of any kind, where it is no such archive, or a damaged one.
    """
    refuse_irregular(path).open("rb").close()  # an OSError with its reason, where torch's reader has another of its own
    with PT2ArchiveReader(str(path)) as archive:
        records = {name: archive.read_bytes(name) for name in archive.get_file_names()}
    checked = _checked(records)
    copy = io.BytesIO()
    with PT2ArchiveWriter(copy) as archive:
        for name, content in checked.items():
            archive.write_bytes(name, content)
    copy.seek(0)
    quiet = logging.getLogger("torch.export")
    level = quiet.level
    quiet.setLevel(logging.CRITICAL)  # it logs the traceback of an error that it also raises
    try:
        program = torch.export.load(copy)
    finally:
        quiet.setLevel(level)
    return move_to_device_pass(program, device).module(check_guards=False)  # guards are Python source


def _checked(records: dict[str, bytes]) -> dict[str, bytes]:
    for name in records:
        if name not in (_MODEL, _INPUTS, *_CONFIGS, *_OF_THE_ARCHIVE) and not _TENSOR.fullmatch(name):
            raise UnsafeProgramError(f"it holds {name}, which is no part of a program of tensors")
    for name in _CONFIGS:
        config = json.loads(records[name])
        _check_strings(config)
        for tensor, entry in config["config"].items():
            folder = name.rpartition("/")[0]
            if entry["use_pickle"] is not False or not _TENSOR.fullmatch(f"{folder}/{entry['path_name']}"):
                raise UnsafeProgramError(f"{tensor} is not stored as a plain tensor")
    try:
        torch.load(io.BytesIO(records[_INPUTS]), weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UnsafeProgramError("its example inputs are not tensors alone") from error
    kept = {name: content for name, content in records.items() if name not in (*_OF_THE_ARCHIVE, _MODEL)}
    return {_MODEL: _checked_model(records[_MODEL]), **kept}


def _checked_model(content: bytes) -> bytes:
    model = json.loads(content)
    graph = model["graph_module"]["graph"]
    for node in graph["nodes"]:
        _check_operator(node["target"])
        node["metadata"] = {}  # stack traces
    model["guards_code"] = []  # Python source
    root = model["graph_module"]["module_call_graph"][0]
    specs = [json.loads(root["signature"].pop(key)) for key in ("in_spec", "out_spec")]
    if specs != [_ONE_TENSOR_IN, _ONE_TENSOR_OUT]:
        raise UnsafeProgramError("it does not take one tensor and return one")
    model["graph_module"]["module_call_graph"] = [root]
    _check_strings(model)
    root["signature"] |= {"in_spec": json.dumps(_ONE_TENSOR_IN), "out_spec": json.dumps(_ONE_TENSOR_OUT)}
    return json.dumps(model).encode()


def _check_operator(target: str) -> None:
    """torch.ops.aten.NAME.OVERLOAD, a symbolic size, or arithmetic on one."""
    known = target.startswith("_operator.") and target.removeprefix("_operator.") in _ARITHMETIC
    match = re.fullmatch(r"torch\.ops\.aten\.(\w+)\.(\w+)", target)
    if match and match[1] != "from_file":  # the one operator that opens files
        packet = getattr(torch.ops.aten, match[1], None)
        known = isinstance(getattr(packet, match[2], None), torch._ops.OpOverload)
    if not known:
        raise UnsafeProgramError(f"it calls {target[:80]}, which is no operator of ATen")


def _check_strings(value: Any) -> None:
    """Every string of a parsed JSON value, keys included, is a plain name or arithmetic on sizes."""
    for key, text in _strings(value):
        if key == "expr_str":
            if _EXPRESSION_TOKEN.sub("", text):
                raise UnsafeProgramError(f"a size is {text[:40]!r}, which is no arithmetic")
        elif text in _NO_TENSORS or not _PLAIN_NAME.fullmatch(text):
            raise UnsafeProgramError(f"it names {text[:40]!r}, which has no place in a program of tensors")


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string in a parsed JSON value with the key it stands under."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, key)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield "", name
            yield from _strings(item, name)
