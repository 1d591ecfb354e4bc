"""Peers: who they are, how they are reached, and the exchange of chunks with them.

Gets what this host has through ports (`p2p.offers`); never imports the pool. Only here may libp2p be imported.
"""
