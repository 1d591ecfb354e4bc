"""Images as trees of files: layers merged into one tree, the tree as a mappable file, reading and listing it.

Nothing here knows FUSE; `mount` shows what is built here.
"""
