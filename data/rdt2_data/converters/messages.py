"""Messages that become part of a dataset: without paths that differ between machines."""

from __future__ import annotations

import os
import re
from typing import Any


def hidden_text(text: str, hide: str) -> str:
    """The text, in which paths below the folder `hide` are relative to it. Nothing is hidden for "" and the root."""
    prefix = hide.rstrip(os.sep)
    if not prefix:
        return text
    # Only where a path begins: `/data` is left alone in `/mnt/data/x` and in `frames/data`.
    return re.sub(rf"(?<![\w./~-]){re.escape(prefix)}{re.escape(os.sep)}", "", text)


def hidden_paths(report: dict[str, Any], hide: str) -> dict[str, Any]:
    """A tally's report whose examples went through `hidden_text`."""
    reasons = {
        reason: {**entry, "examples": [hidden_text(line, hide) for line in entry["examples"]]}
        for reason, entry in report["reasons"].items()
    }
    return {**report, "reasons": reasons}
