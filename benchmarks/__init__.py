"""Measurements against the peers that the `bench` extra pins: each program interleaves them with us in one run."""
