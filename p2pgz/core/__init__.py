"""The rules of p2pgz without any input or output: no trio, no sockets, no files, no clock.

Everything here is a plain function or value; the packages above feed it bytes and act on what it answers.
"""
