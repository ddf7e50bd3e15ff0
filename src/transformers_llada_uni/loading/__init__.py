"""
How weights come into memory and where they stay: by name from any layout, quantised, offloaded, or made one again from
shards; and how a folder of them appears on disk, whole or not at all. Nothing here computes with them.
"""
