"""
The server: an engine that batches requests, and the HTTP app before it, in the shape of OpenAI's. Needs
`pip install "llada-uni[serve]"`. What a request means for the model is the pipeline's to say, not this folder's.
"""
