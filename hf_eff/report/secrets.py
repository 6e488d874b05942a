"""Keys and passwords taken out of text before it is written where others can read it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

_KEYS = re.compile(r"\b(hf_|sk-|gh[opsu]_|github_pat_|glpat-|xox[abp]-|AKIA)[A-Za-z0-9_-]{12,}")
_NAMED = re.compile(
    r"((?:hub_token|hub-token|auth_token|access_token|api_key|api-key|password|secret)[\"']?\s*[=:\s]\s*[\"']?)[^\s\"',}]+",
    re.IGNORECASE,
)
_LOGIN = re.compile(r"(://)[^/\s:@]+:[^/\s@]+@")


def mask_secrets(text: str) -> str:
    """Replace access keys, values of password-like options and logins inside addresses.

    >>> mask_secrets("train --hub_token hf_abcdefghijklmnopqrst --seed 1")
    'train --hub_token *** --seed 1'
    """
    text = _NAMED.sub(r"\1***", text)
    text = _KEYS.sub(r"\1***", text)
    return _LOGIN.sub(r"\1***@", text)


def publishable(value: Any) -> Any:
    """A JSON-able copy without secrets; NaN and infinities become None, which JSON can hold."""
    if isinstance(value, Mapping):
        return {str(key): _publishable_entry(str(key), item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [publishable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int)):
        return value
    return mask_secrets(str(value))


def _publishable_entry(key: str, value: Any) -> Any:
    """Mask by the key's name too: the value alone may look harmless."""
    if isinstance(value, str) and _NAMED.match(f"{key}=x"):
        return "***"
    return publishable(value)
