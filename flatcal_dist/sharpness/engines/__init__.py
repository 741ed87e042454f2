"""The engines: who holds weights and gradients, and how both are moved."""
