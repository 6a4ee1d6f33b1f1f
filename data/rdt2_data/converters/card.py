"""The page that tells people what a dataset holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_SHOWN = 30
"""Instructions listed; a dataset may have thousands."""


def dataset_card(name: str, manifest: Mapping[str, Any], sentences: Mapping[str, str]) -> str:
    """Markdown.

    Args:
        name: of the dataset.
        manifest: what `manifest.json` says.
        sentences: what `instructions.json` says.
    """
    minutes = manifest["seconds"] / 60
    lines = [
        f"# {name}",
        "",
        "Bimanual action chunks for RDT2, as tar shards: relative chunks of 24 frames at 30 Hz, right arm then left",
        "arm, in the policy frame, with the composite image left wrist | right wrist.",
        "",
        "| | |",
        "|---|---|",
        f"| samples | {manifest['samples']} in {len(manifest['shards'])} shards |",
        f"| recorded time | {minutes:.1f} min in {manifest['episodes']} episodes |",
        f"| size | {manifest['bytes'] / 1e6:.1f} MB |",
        f"| action tokens | {'yes' if manifest['action_tokens'] else 'no'} |",
        f"| samples without a measured gripper width | {manifest['gripper_unmeasured']} |",
        f"| source images | {_sizes(manifest['image_sizes'])} |",
        *_instructions(manifest["instructions"], sentences),
        *_left_out(manifest),
        "",
        "## Options",
        "",
        "```json",
        json.dumps(manifest["options"], indent=2),
        "```",
        "",
    ]
    return "\n".join(lines)


def _sizes(image_sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{count} of {size}" for size, count in image_sizes.items())


def _instructions(counts: Mapping[str, int], sentences: Mapping[str, str]) -> list[str]:
    lines = ["", "## Instructions", "", "| key | samples | sentence |", "|---|---|---|"]
    lines += [f"| {key} | {count} | {_cell(sentences[key])} |" for key, count in list(counts.items())[:_SHOWN]]
    hidden = len(counts) - _SHOWN
    return [*lines, f"\n{hidden} more are in `instructions.json`."] if hidden > 0 else lines


def _left_out(manifest: Mapping[str, Any]) -> list[str]:
    edges = {f"frames {edge}": count for edge, count in manifest["left_out"].items()}
    reasons = {
        f"{reason}: {entry['meaning']}": entry["count"] for reason, entry in manifest["problems"]["reasons"].items()
    }
    lines = ["", "## Left out", ""]
    lines += [f"- {count} x {what}" for what, count in (edges | reasons).items()] or ["Nothing."]
    notes = [f"{episode}: {note}" for episode, note in manifest["notes"].items()] + list(manifest["image_notes"])
    return [*lines, "", "## Notes", "", *(f"- {_cell(note)}" for note in notes)] if notes else lines


def _cell(text: str) -> str:
    return text.replace("\n", " ").replace("|", "\\|")
