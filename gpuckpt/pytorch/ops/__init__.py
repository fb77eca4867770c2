"""The fused operations, one a file, and in private files what several of them share. The public face is `gpuckpt.functional`."""
