"""Several ranks of one job: what they have to agree on."""
