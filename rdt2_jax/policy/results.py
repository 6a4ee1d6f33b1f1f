"""What policies answer beside chunks: tokens, generations that are no chunk, networks that give no numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rdt2_jax.action_tokenizer.config import ActionTokenizerConfig
from rdt2_jax.actions.layout import GROUP_NAMES, GroupName
from rdt2_jax.errors import Rdt2Error


@dataclass(frozen=True)
class TokenEntry:
    """One token of a chunk.

    Attributes:
        group: channels that it describes: positions, rotations or widths.
        latent: latent step, from 0; one lasts 8 frames.
        level: level of the residual quantizer, from 0, coarse to fine.
        token: code, in [0, num_codes).
        token_id: the same as an id of the language model.
        probability: of the token among all action and stop tokens.
        stop_probability: of all stop tokens together; they cannot be chosen, but a model that wants to stop here has
            not understood.
    """

    group: GroupName
    latent: int
    level: int
    token: int
    token_id: int
    probability: float
    stop_probability: float


@dataclass(frozen=True, eq=False)
class VqTokens:
    """The action tokens of a batch of observations.

    Attributes:
        config: of the action tokenizer; says which token means what.
        observation_ids: one per row.
        tokens: int32 (B, num_tokens), codes in [0, num_codes).
        token_ids: int32 (B, num_tokens), the same as ids of the language model.
        probabilities: float32 (B, num_tokens), of each chosen token among all action and stop tokens.
        stop_mass: float32 (B, num_tokens), probability of all stop tokens together at each position.
    """

    config: ActionTokenizerConfig
    observation_ids: tuple[str, ...]
    tokens: np.ndarray
    token_ids: np.ndarray
    probabilities: np.ndarray
    stop_mass: np.ndarray

    def __len__(self) -> int:
        return len(self.observation_ids)

    def entries(self, row: int = 0) -> Iterator[TokenEntry]:
        """The tokens of one observation in their order: groups one after the other, in them latents, in them levels."""
        for group in GROUP_NAMES:
            levels = self.config.num_levels(group)
            for i, at in enumerate(range(*self.config.token_slice(group).indices(self.config.num_tokens))):
                yield TokenEntry(
                    group,
                    i // levels,
                    i % levels,
                    int(self.tokens[row, at]),
                    int(self.token_ids[row, at]),
                    float(self.probabilities[row, at]),
                    float(self.stop_mass[row, at]),
                )


@dataclass(frozen=True)
class InvalidGeneration:
    """The model generated something that is no chunk. Stands in the place of a chunk, and has no actions.

    Attributes:
        observation_id: of the observation that was to be answered.
        tokens: ids of the language model, up to and with the first stop token.
        num_tokens_before_end: ids before the stop token, or all, where there is none.
        foreign_ids: those among them that are no action tokens.
        reason: what is wrong, in words.
    """

    observation_id: str
    tokens: tuple[int, ...]
    num_tokens_before_end: int
    foreign_ids: tuple[int, ...]
    reason: str


class InvalidGenerationError(Rdt2Error):
    """A single answer was asked for, and it is no chunk. `result` says what was generated."""

    def __init__(self, result: InvalidGeneration) -> None:
        super().__init__(
            "the model did not generate an action chunk",
            where=f"answer to observation {result.observation_id!r}",
            expected="as many action tokens as a chunk has, then <|quad_end|>",
            found=f"{result.reason}; ids {list(result.tokens)}",
            fix="use constrained decoding (constrained=True, the default), or check that vlm and tokenizer belong "
            "together",
        )
        self.result = result


class NetworkOutputError(Rdt2Error):
    """A network gave NaN or infinity, or numbers that are no chunk, such as a rotation that is none."""
