"""
The applications of LLaDA2.0-Uni, which know both `transformers_llada_uni` and `diffusers_llada_uni`: the command
`llada-uni` and what it does (`commands`), the server (`serving`), and `llada_uni.conversion` of released checkpoints.
No model code lives here.
"""
