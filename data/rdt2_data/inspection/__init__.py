"""A dataset as one HTML page: what is in it, which instructions, pictures with their motion, and every channel."""
