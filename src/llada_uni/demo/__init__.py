"""
The web page: draw, edit, chat and tell stories in a browser, on Gradio. Needs `pip install "llada-uni[demo]"`. A file
for each tab, and what they share; what a request means for the model is the pipeline's to say, not this folder's.
"""
