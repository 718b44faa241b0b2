"""What the transport for torchft is made of: ``connection.py`` (two processes that know one secret), ``snapshot.py`` (the
state as one header and a few slabs), ``restoring.py`` (the way back, into tensors that are there).
"""
