"""Choices that all policies share."""

from __future__ import annotations

import itertools
from typing import Annotated, Literal

from pydantic import Field, field_validator

from rdt2_jax.config import FrozenConfig, PositiveInt
from rdt2_jax.errors import ConfigError

JpegQuality = Annotated[int, Field(ge=1, le=100)]


class PolicyOptions(FrozenConfig):
    """How a policy is run.

    Attributes:
        prompt_lengths: tokens that prompts are padded to, ascending; each costs compilations. The published composite
            image takes 378 of them and the chat template 22, so that 448 leaves 48 for the instruction.
        batch_sizes: numbers of observations that are run at once, ascending; each costs compilations. Others are
            padded, or run in parts.
        jpeg_quality: the composite image goes through JPEG with this quality (4:2:0); None: it does not. "published"
            is 95 for VQ, which was trained on JPEG images, and None for the others.
        compile_at_start: run zeros through every prompt length and batch size when the policy is made, so that no
            later call has to compile.
        seed: of the noise that flow policies start from.
        with_prefix: flow policies alone. Compile at start for chunks with a prefix (of the default guidance) too;
            without, the first of them compiles.
        constrained: VQ alone. True: nothing but whole chunks of action tokens can be generated. False: any token can,
            as in the published code, and a generation that is no chunk is reported as invalid.
    """

    prompt_lengths: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (448, 512)
    batch_sizes: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1,)
    jpeg_quality: JpegQuality | Literal["published"] | None = "published"
    compile_at_start: bool = True
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    with_prefix: bool = False
    constrained: bool = True

    @field_validator("prompt_lengths", "batch_sizes")
    @classmethod
    def _ascending(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if any(a >= b for a, b in itertools.pairwise(sizes)):
            raise ValueError("must be ascending, each size once")
        return sizes

    def check(self, kind: str) -> None:
        """Refuses choices that a kind of policy would ignore.

        Raises:
            ConfigError: `with_prefix` for "vq", or `constrained=False` for another.
        """
        if kind == "vq" and self.with_prefix:
            raise ConfigError("VQ takes no prefix", where="with_prefix", fix="leave it out, or use a flow policy")
        if kind != "vq" and not self.constrained:
            raise ConfigError("there is nothing to constrain in a flow policy", where="constrained", fix="leave it out")
