"""
How weights come into memory and where they stay: by name from any layout, quantised, offloaded, or made one again from
shards. Nothing here computes with them.
"""
