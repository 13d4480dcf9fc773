"""Ways of running the units of a plan."""
