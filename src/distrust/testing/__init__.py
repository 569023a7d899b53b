"""A small engine, small models and small data, for tests and campaigns."""
