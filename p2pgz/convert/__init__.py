"""Writing images anew so that they can be read lazily: eStargz and zstd:chunked.

`convert.convert_image` is the way in. Layers are read by `core.tar`, so that everything a real layer may hold
is coped with, and written by `writer` (eStargz) or `zstd_writer`; both give the same bytes for the same input
and options, on any number of threads.
"""
