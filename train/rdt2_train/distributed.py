"""Several processes as one: every one of them runs the same program, and sees all devices."""

from __future__ import annotations

import os

import jax

from rdt2_jax.errors import ConfigError

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def join_processes() -> None:
    """Joins the other processes, if the environment names them; to be called before anything asks for devices.

    On TPU pods and under Slurm jax finds them by itself once it is asked to; elsewhere the three `VARIABLES` say where
    the first process listens (host:port), how many there are, and which one this is.

    Raises:
        ConfigError: some of the variables are missing or are no numbers.
    """
    given = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    if not given:
        if "SLURM_NTASKS" in os.environ and int(os.environ["SLURM_NTASKS"]) > 1:
            jax.distributed.initialize()
        return
    if len(given) < len(VARIABLES) or not all(given[name].isdigit() for name in VARIABLES[1:]):
        raise ConfigError(
            "the processes of a run cannot find each other",
            where="environment",
            expected=f"{VARIABLES[0]}=host:port, and numbers in {' and '.join(VARIABLES[1:])}",
            found=given,
        )
    jax.distributed.initialize(
        coordinator_address=given[VARIABLES[0]],
        num_processes=int(given[VARIABLES[1]]),
        process_id=int(given[VARIABLES[2]]),
    )
