"""Networks by name, and weights for them."""
