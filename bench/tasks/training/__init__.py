"""Fine-tuning a one-step restorer: model, objective, arms, checkpoints."""
