"""DistrustTrainer."""
