"""What the node serves: the control API on a unix socket, and descriptors of mounts beside it."""
