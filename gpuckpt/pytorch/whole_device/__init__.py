"""What a training step holds on its device: predicted from a model's configuration, and written down while it runs."""
