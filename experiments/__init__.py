"""Experiments that the documentation's claims rest on: each one command, with its seeds."""
