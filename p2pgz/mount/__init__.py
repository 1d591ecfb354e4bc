"""Images as file systems: the `fs` processes that serve them through FUSE, and the node's side of those processes.

The only package that imports pyfuse3. `session` is what the node uses; `attach` and `umount` what commands use.
"""
