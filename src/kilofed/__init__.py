"""kilofed: federated fine-tuning of language models, for people whose data may not move."""
