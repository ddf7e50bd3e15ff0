"""What the command `llada-uni` does, a file for each kind of task. Options and their names are `llada_uni.cli`'s."""
