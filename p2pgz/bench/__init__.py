"""`p2pgz bench`: how fast lazy images are on this host, and what limits them.

Called by the command line. Everything is done by processes of `p2pgz` with state directories of their own, as a user would,
and nothing is left behind; only `bench.stages` runs in this process.
"""
