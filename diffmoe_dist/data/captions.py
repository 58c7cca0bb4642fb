"""The captions of a sample, wherever its origin put them."""

from __future__ import annotations

import json
from collections.abc import Mapping

from diffmoe_dist.data.format import CAPTION_FIELD, METADATA_FIELD
from diffmoe_dist.files import is_utf8


def captions_in(payloads: Mapping[str, bytes]) -> list[str]:
    """All captions: `captions` of the `json`, else `txt`, else `caption` of the `json` (img2dataset without a txt).

    Strings that are no text in UTF-8 do not count. Raises ValueError for a `json` or `txt` that is none.
    """
    try:
        described = json.loads(payloads.get(METADATA_FIELD, b"{}"))
        text = payloads.get(CAPTION_FIELD, b"").decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("its text is not UTF-8") from None
    except (ValueError, RecursionError):
        raise ValueError("its json does not parse") from None
    notes = described if isinstance(described, dict) else {}
    for found in (notes.get("captions"), text, notes.get("caption")):
        listed = found if isinstance(found, list) else [found]
        if captions := [one for one in listed if isinstance(one, str) and one.strip() and is_utf8(one)]:
            return captions
    return []
