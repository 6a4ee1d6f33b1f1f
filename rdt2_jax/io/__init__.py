"""Files, read and written safely: atomic writes, `.npy` without unpickling, torch archives without torch. No jax."""
