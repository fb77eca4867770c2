"""The bytes of a whole training step on one device: arithmetic on a chain, its parameters, an optimizer and a layout."""
