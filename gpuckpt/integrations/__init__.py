"""Training tools that others wrote, each in a file of its own. Importing this loads none of them."""
