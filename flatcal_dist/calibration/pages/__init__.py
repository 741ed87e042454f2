"""What every page shares: the frame, colours, and how values are printed."""
