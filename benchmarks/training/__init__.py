"""What a training step costs: ours, transformers' Trainer with peft, TRL's SFTTrainer, and mlx-lm."""
