"""What a training step costs: ours beside transformers' Trainer with peft, TRL's SFTTrainer, and mlx-lm."""
