"""From wanted chunk to verified chunk in the pool: who is asked, in which order, how often.

`service.ChunkFetcher` is the door; `dispatch` spends request slots, `from_registry` runs one request. Imports pool and
registry ports, never mount or image.
"""
