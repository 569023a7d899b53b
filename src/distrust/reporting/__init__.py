"""Observers of the loop's events."""
