"""The three stages that train: SFT, reward model, PPO."""
