"""What forward saw besides its arguments, and how a recompute sees the same."""
