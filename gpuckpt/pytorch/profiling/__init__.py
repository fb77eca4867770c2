"""What is learned of a model before it is planned: its chain, bytes and seconds."""
