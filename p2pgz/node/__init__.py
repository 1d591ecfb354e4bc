"""The daemon: everything below joined together. `run` composes, `Node` is what commands may ask for, `peering` the swarm."""

from p2pgz.node.node import Node
from p2pgz.node.run import open_node, run_node

__all__ = ["Node", "open_node", "run_node"]
