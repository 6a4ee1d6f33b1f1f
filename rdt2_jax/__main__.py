"""`python -m rdt2_jax` is the `rdt2` command."""

from rdt2_jax.cli import main

main()
