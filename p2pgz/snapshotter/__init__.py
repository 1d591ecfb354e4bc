"""A remote snapshotter for containerd: images start lazily, as mounts of the node, below containers' own layers.

`p2pgz snapshotter` composes it. Nothing here reads an image or fetches a byte: that is the node's, by its control API
(`images.Images`). A chain of layers is one merged mount, docs/explanation/containerd.md says why.
"""
