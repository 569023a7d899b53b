"""The parts of ``campaigns.power_loss`` and ``campaigns.failing_calls``."""
