"""From dense checkpoints to mixtures of experts."""
