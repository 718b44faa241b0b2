"""What the integration with torch_checkpointing is made of.

staging              the stager: copies a payload for the subprocess that writes it
storage              the storage: files that are hashed while they are written, and checked while they are read
write_stream         one file that is being written, and its receipt
leftovers            what a failed save has left
read_stream          one file of a committed checkpoint that is being read
commit               from files and receipts to a checkpoint with a manifest
"""
