"""A module of settings, as projects have one; for test_where_code_leads.py."""

RATE = 1.0


def scaled(x):
    """x, scaled by a setting of this module."""
    return x * RATE
