"""The recorders that come with nanoeval, by their factories; `module:function` on command lines."""

from __future__ import annotations

from nanoeval.json_recorder import json_recorder
from nanoeval.recorder import dummy_recorder

__all__ = ["dummy_recorder", "json_recorder"]
