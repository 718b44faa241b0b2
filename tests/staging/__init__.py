"""The staging API: engine, stagers, replication."""
