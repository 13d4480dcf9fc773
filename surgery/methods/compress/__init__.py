"""Methods that store the linear layers of a model with fewer numbers."""
