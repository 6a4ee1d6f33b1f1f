"""Runs of every stage from model folders on disk, as the command makes them; also a program that a test can kill.

As a program: `python train_runs.py ROOT OUT STAGE STEPS`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

STAGES = ("vq", "vq_lora", "fm", "fm_full", "one_step")


def write_models(root: Path) -> Path:
    """Folders of a tiny backbone, expert, tokenizer, normalizer and data."""
    import small_policy
    import train_setups
    from qwen_vocabulary import byte_ranks, tokenizer_json

    from rdt2_jax.action_expert.checkpoint import save_expert
    from rdt2_jax.action_tokenizer.checkpoint import save_tokenizer
    from rdt2_jax.qwen2_5_vl import processor
    from rdt2_jax.qwen2_5_vl.flax_module import Qwen25VL

    backbone = small_policy.byte_backbone()
    Qwen25VL(backbone.config, small_policy.stacked_params(backbone.config)).save_pretrained(root / "vlm")
    (root / "vlm/tokenizer.json").write_text(json.dumps(tokenizer_json(byte_ranks())))
    published = processor.to_published(small_policy.SMALL_IMAGES)
    (root / "vlm/preprocessor_config.json").write_text(json.dumps(published))
    save_expert(small_policy.expert(), root / "expert")
    (root / "tokenizer").mkdir()
    save_tokenizer(small_policy.codec(64), root / "tokenizer")
    small_policy.normalizer().save(root / "normalizer.npz")
    (root / "data.json").write_text(json.dumps(str(train_setups.dataset())))
    return root


def run_config(root: Path, stage: str, steps: int, **changes: Any) -> Any:
    """A short run of a stage; changes are fields of its configuration."""
    from rdt2_train.fm import FmConfig
    from rdt2_train.one_step import OneStepConfig
    from rdt2_train.vq import VqConfig

    kind, _, variant = stage.partition("_")
    values: dict[str, Any] = {
        "model": str(root / "vlm"),
        "data": {
            "dataset": json.loads((root / "data.json").read_text()),
            "text_length": 112,
            "max_supervised": 40,
            "threads": 1,
            "prefetch": 1,
        },
        "batch_size": 8,
        "mesh": {"devices": 1},
        "optimizer": {"schedule": {"peak": 1e-3}},
        "loop": {
            "steps": steps,
            "log": {"every": 1, "tensorboard": False},
            "checkpoints": {"every": 2, "asynchronous": False},
        },
    }
    config: Any = VqConfig
    if kind == "fm":
        config = FmConfig
        values |= {"expert": str(root / "expert"), "normalizer": str(root / "normalizer.npz")}
        values |= {"backbone": variant} if variant else {}
    elif kind == "one":
        config = OneStepConfig
        values |= {"teacher": str(root / "expert"), "normalizer": str(root / "normalizer.npz")}
    elif variant == "lora":
        values |= {"adapters": {"rank": 2}}
    return config(**(values | changes))


def run_stage(root: Path, out: Path, stage: str, steps: int, **changes: Any) -> Any:
    """Trains; returns the state."""
    from rdt2_train.fm import fm_run
    from rdt2_train.loop import train
    from rdt2_train.one_step import one_step_run
    from rdt2_train.vq import vq_run

    config = run_config(root, stage, steps, **changes)
    make: Any = {"vq": vq_run, "fm": fm_run, "one": one_step_run}[stage.partition("_")[0]]
    return train(make(config), config.loop, out)


if __name__ == "__main__":
    import jax

    jax.config.update("jax_platforms", "cpu")
    run_stage(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
