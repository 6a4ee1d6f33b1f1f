"""Digital twins of the robots, in MuJoCo."""
