"""A small engine, small models and small data: what the tests and the campaigns train with."""
