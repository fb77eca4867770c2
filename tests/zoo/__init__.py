"""Models as people train them, built small from configs: nothing is downloaded."""
