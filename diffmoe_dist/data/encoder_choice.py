"""Which text encoders make the vectors of a caption: a model's folder, or a file that names several or a layer."""

from __future__ import annotations

import inspect
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffmoe_dist.data.encoding import model_sha256
from diffmoe_dist.data.index import text_sha256
from diffmoe_dist.data.model_folder import check_model_folder, read_model_config
from diffmoe_dist.errors import UserError
from diffmoe_dist.files import refuse_irregular

MODEL_FILES = ("*.json", "*.txt", "*.model", "*.safetensors")
CLIP, T5 = "clip", "t5"
_USUAL_LENGTH = {CLIP: 77, T5: 120}  # tokens
_USUAL_LENGTH_OF_OTHERS = 256
_KINDS = {"clip": CLIP, "clip_text_model": CLIP, "t5": T5}  # by the model_type of config.json
_CLASSES = {CLIP: "CLIPTextModel", T5: "T5EncoderModel"}
_PROJECTING_CLIP = "CLIPTextModelWithProjection"
_ENTRIES = {"folder": str, "tokenizer": str, "layer": int, "max_length": int}


@dataclass(frozen=True)
class EncoderChoice:
    """One encoder, and what is taken of it."""

    folder: Path
    tokenizer: Path | None  # None: beside the encoder's weights
    max_length: int | None  # tokens of a caption at most, start and end included; None: the usual number
    layer: int | None  # of transformers' hidden_states, 0 the embeddings, -1 the last; None: last_hidden_state
    named: str  # by the user, in an error
    beside: bool = False  # its vectors stand beside those of the encoder before, token by token; else after them

    @property
    def kind(self) -> str:
        """`clip`, `t5`, or the model_type of another encoder. Raises UserError for a folder that holds no encoder."""
        config = read_model_config(self.folder, self.named, "give the local folder of a text encoder")
        found = config.get("model_type")
        model_type = found if isinstance(found, str) else str(found)
        if model_type not in _KINDS:
            _check_class(self.named, model_type)
        check_model_folder(self.folder, self.named, "a text encoder", (model_type,))
        return kind_of(model_type)

    @property
    def class_name(self) -> str:
        """The class of transformers that the encoder is loaded as."""
        kind = self.kind
        if kind == CLIP and _PROJECTING_CLIP in (read_model_config(self.folder, self.named).get("architectures") or ()):
            return _PROJECTING_CLIP
        return _CLASSES.get(kind) or _class_of(kind, self.named)

    @property
    def length(self) -> int:
        return _USUAL_LENGTH.get(self.kind, _USUAL_LENGTH_OF_OTHERS) if self.max_length is None else self.max_length

    @property
    def folders(self) -> tuple[Path, ...]:
        """Of the encoder and, where it is another, of the tokenizer."""
        return (self.folder,) if self.tokenizer is None else (self.folder, self.tokenizer)

    @property
    def sha256(self) -> str:
        """The fingerprint of the files of encoder and tokenizer, and of what else than the usual is taken of them."""
        own, *others = (model_sha256(folder, *MODEL_FILES) for folder in self.folders)
        files = own[:32] + others[0][:32] if others else own
        chosen = [
            *(["projected"] if self.class_name == _PROJECTING_CLIP else []),
            *([] if self.layer is None else [f"layer {self.layer}"]),
        ]
        return text_sha256(iter([files, *chosen])) if chosen else files


def kind_of(model_type: str) -> str:
    """What kind of encoder a model of transformers is: `clip`, `t5`, or another one by its own name."""
    return _KINDS.get(model_type, model_type)


def choose_encoders(
    path: str | Path, tokenizer: str | Path | None, max_length: int | None, setting: str
) -> tuple[EncoderChoice, ...]:
    """The encoders that `path` names: one of a folder, or those of a .json file, in their order.

    Args:
        path: a folder, or a file with a list of {"folder", "tokenizer", "max_length", "layer"}, of which only the
            first must be given; its paths are relative to the file. A list in that list is of encoders side by side.
        tokenizer: of the encoder in a folder, where it lies elsewhere.
        max_length: of all encoders together; None: what they say, or the usual number.
        setting: how the user named the path.

    Raises:
        UserError: a file that is none, or a length that is not the sum of its lengths.
    """
    path, named = Path(path), f"{setting}={path}"
    if path.suffix != ".json":
        choice = EncoderChoice(path, None if tokenizer is None else Path(tokenizer), max_length, None, named)
        return (choice,)
    if tokenizer is not None:
        raise UserError(f"{named}: names tokenizers itself, but one is given ({tokenizer}); leave that out")
    choices = tuple(
        replace(_choice(entry, path.parent, named), beside=place > 0)
        for group in _read_list(path, named)
        for place, entry in enumerate(group if isinstance(group, list) else [group])
    )
    for first, second in itertools.pairwise(choices):
        if second.beside and second.length != first.length:
            raise UserError(
                f"{second.named}: stands beside {first.folder.name} with {second.length} tokens, not {first.length}; "
                "give both the same max_length"
            )
    if len(choices) == 1 and choices[0].max_length is None:
        return (replace(choices[0], max_length=max_length),)
    together = sum(choice.length for choice in choices if not choice.beside)
    if max_length not in (None, together):
        raise UserError(f"{named}: its captions have {together} tokens together, not {max_length}; set that")
    return choices


def choices_sha256(choices: Sequence[EncoderChoice]) -> str:
    """The fingerprint of all; of one its own. How many tokens each has is part of it where there are several."""
    if len(choices) == 1:
        return choices[0].sha256
    return text_sha256(
        part
        for choice in choices
        for part in (choice.sha256, str(choice.length), *(["beside"] if choice.beside else []))
    )


def choices_kind(choices: Sequence[EncoderChoice]) -> str:
    """`clip+t5` of encoders whose tokens follow each other, `clip|clip+t5` where the first two stand side by side."""
    return "".join(f"{'|' if choice.beside else '+'}{choice.kind}" for choice in choices)[1:]


def _read_list(path: Path, named: str) -> list[Any]:
    try:
        found = json.loads(refuse_irregular(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{named}: cannot be read as JSON ({error}); write a list of encoders") from None
    if not isinstance(found, list) or not found:
        raise UserError(f'{named}: holds no list of encoders; write [{{"folder": "DIR"}}]')
    if [] in found:
        raise UserError(f'{named}: holds a list without encoders; write [{{"folder": "DIR"}}]')
    return found


def _choice(entry: Any, root: Path, named: str) -> EncoderChoice:
    if not isinstance(entry, dict) or "folder" not in entry:
        raise UserError(f'{named}: {json.dumps(entry)} is no encoder; write {{"folder": "DIR"}}')
    for name, value in entry.items():
        wanted = _ENTRIES.get(name)
        if wanted is None:
            raise UserError(f"{named}: {name} is not known of an encoder; there are {', '.join(_ENTRIES)}")
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise UserError(f"{named}: {name}={json.dumps(value)} must be {'a path' if wanted is str else 'a number'}")
        if name == "max_length" and entry["max_length"] < 2:
            raise UserError(f"{named}: max_length={value} must be at least 2")
    tokenizer = entry.get("tokenizer")
    return EncoderChoice(
        root / entry["folder"],
        None if tokenizer is None else root / tokenizer,
        entry.get("max_length"),
        entry.get("layer"),
        f"{named}: {entry['folder']}",
    )


def import_transformers(named: str) -> Any:
    """The package. Raises UserError, for what the user named, where it does not import."""
    try:
        import transformers
        from transformers.models.auto import modeling_auto  # noqa: F401, imported on demand otherwise
    except (ImportError, RuntimeError) as error:  # RuntimeError: beside a torchvision of another torch
        raise UserError(f"{named}: transformers does not import ({error}); pip install transformers") from error
    return transformers


def _check_class(named: str, model_type: str) -> None:
    """Refuse what transformers has no class for, or none that makes vectors of tokens alone."""
    class_name = _class_of(model_type, named)
    takes = inspect.signature(getattr(import_transformers(named), class_name).forward).parameters if class_name else {}
    if "input_ids" not in takes or "decoder_input_ids" in takes:
        raise UserError(
            f"{named}: is {model_type}, which does not encode text alone; give the local folder of CLIP, T5 or another "
            "text encoder or causal model of transformers"
        )


def _class_of(model_type: str, named: str) -> str:
    """The class without a head that transformers' AutoModel takes, of an encoder and decoder the encoder; or none."""
    auto = import_transformers(named).models.auto.modeling_auto
    for names in (auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES, auto.MODEL_MAPPING_NAMES):
        if isinstance(found := names.get(model_type), str):
            return found
    return ""
