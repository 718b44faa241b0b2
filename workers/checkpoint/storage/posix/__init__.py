"""A file system as a storage: local disks, NFS, Lustre and others that have a rename."""
