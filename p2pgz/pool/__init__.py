"""This host's chunk bytes on disk, and the index of what is there.

`pool.Pool` is the door. Bytes come in as `VerifiedChunk` only and are read as slices of an mmap. Only this
package imports apsw; `presence` and `segment` do not, since the `fs` process needs just those two.
"""
