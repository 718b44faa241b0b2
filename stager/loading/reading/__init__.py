"""From the files of a checkpoint into memory: nothing here knows keys or structures."""
