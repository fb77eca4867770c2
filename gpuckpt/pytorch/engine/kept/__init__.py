"""What forward made and a recompute is given back instead of making it again."""
