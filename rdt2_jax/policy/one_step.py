"""The distilled RDT2-FM: one step of the action expert from noise to actions."""

from __future__ import annotations

from typing import ClassVar

from rdt2_jax.action_expert.flow import ONE_STEP
from rdt2_jax.actions.normalizer import LinearNormalizer
from rdt2_jax.policy.backbone import Backbone
from rdt2_jax.policy.fm import Expert, FmPolicy
from rdt2_jax.policy.options import PolicyOptions


class OneStepPolicy(FmPolicy):
    """RDT2-FM after distillation ("UltraFast"): `FmPolicy` with a student that goes all the way in one step."""

    kind: ClassVar[str] = "one-step"

    def __init__(
        self,
        backbone: Backbone,
        expert: Expert,
        normalizer: LinearNormalizer,
        *,
        options: PolicyOptions | None = None,
    ) -> None:
        """As `FmPolicy`, without the choice of a schedule."""
        super().__init__(backbone, expert, normalizer, options=options, schedule=ONE_STEP)
