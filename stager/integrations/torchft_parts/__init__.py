"""What ``stager.integrations.torchft`` is made of.

connection   two processes that know one secret, connected by TCP
snapshot     the state as it travels: one header and a few slabs
restoring    the way back, into tensors that are there
"""
