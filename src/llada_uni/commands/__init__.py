"""
The commands of `llada-uni`, a file for each kind of task: their options, and what they do. `llada_uni.cli` puts them
together, and asks for torch and what else is slow to import only once one of them runs.
"""
