"""What runs in forward and backward: hooks, held storages, frames and what they see."""
