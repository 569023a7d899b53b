"""Experiments behind the documentation's claims: each is one command, with its seeds."""
