"""Object stores: real servers on this host, faults between them and stager, and what survives."""
