"""What is learnt, as tensors: noise, the attention mask of training, the loss, the balance of experts. No trainers."""
